"""AWQ: the published errors, folding that costs no byte, and less harm than rounding where inputs stand out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated_layers import LAYERS, calibrated_layer, computed, relative_error
from conftest import calibrated, random_system
from golden_layer import agrees, golden_inputs, golden_linear, output_error

from effbench import models, store
from effbench.data import WorldSource
from effbench.errors import TechniqueError, UnfitError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.measure.quality import score
from effbench.registry import get, parse
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.prepared import ScaledLinear
from effbench.toolbox.walk import matrices


@pytest.mark.parametrize(
    ("bits", "clip", "golden"),
    [
        (4, False, "3.1114e-03"),
        (3, False, "1.4821e-02"),
        (2, False, "7.2515e-02"),
        (4, True, "2.6819e-03"),
        (3, True, "1.2178e-02"),
        (2, True, "5.2198e-02"),
    ],
)
def test_it_meets_the_errors_of_the_released_code(bits: int, clip: bool, golden: str) -> None:
    technique = get("awq")(bits=bits, group_size=128, clip=clip, scale_dtype="float32")
    assert agrees(output_error(technique.layer(golden_linear(), golden_inputs())), golden, 1e-3)


# from running mit-han-lab/llm-awq at d6e797a on these layers, in float32: _search_module_scale, auto_clip_layer and
# pseudo_quantize_tensor; the clip takes rows by 64 only, which the first layer does not have
SCALED = {
    (4, 32): ("2.31218e-03", "2.70916e-03", "3.06055e-03"),
    (3, 32): ("1.19974e-02", "1.26884e-02", "1.43381e-02"),
    (2, 32): ("6.04659e-02", "6.78680e-02", "8.01082e-02"),
    (3, 0): ("1.82665e-02", "2.31047e-02", "2.66834e-02"),
}
CLIPPED = {
    (4, 32): ("", "2.56413e-03", "2.82107e-03"),
    (3, 32): ("", "1.15727e-02", "1.27194e-02"),
    (2, 32): ("", "5.39432e-02", "6.40806e-02"),
    (3, 0): ("", "1.77281e-02", "2.04077e-02"),
}


@pytest.mark.parametrize("seed", LAYERS)
@pytest.mark.parametrize(("bits", "group_size"), SCALED)
def test_it_meets_the_released_code_on_other_layers_too(bits: int, group_size: int, seed: int) -> None:
    linear, inputs = calibrated_layer(seed)
    errors = []
    for clip in (False, True):
        technique = get("awq")(bits=bits, group_size=group_size, clip=clip, scale_dtype="float32")
        stored = computed(technique.layer(linear, inputs), linear.in_features)
        errors.append(relative_error(linear.weight, stored, inputs))
    assert agrees(errors[0], SCALED[bits, group_size][seed - 1], 1e-3)
    if golden := CLIPPED[bits, group_size][seed - 1]:
        assert agrees(errors[1], golden, 1e-3)
    assert errors[1] < errors[0]


def test_its_search_begins_with_plain_rounding() -> None:
    even = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).sign()  # all channels alike
    scaled = get("awq")(clip=False).layer(golden_linear(), even)
    assert isinstance(scaled, ScaledLinear) and (scaled.scales == 1).all()
    assert torch.equal(scaled.inner.dequantized(), get("rtn")().layer(golden_linear(), None).dequantized())


def test_scales_that_nothing_can_take_are_stored_and_counted() -> None:
    module = get("awq")(bits=3, group_size=64).layer(golden_linear(), golden_inputs())
    for _ in range(2):
        assert module_bytes(module) * 8 / (64 * 256) == pytest.approx(3 + 19 / 64 + 16 / 64, rel=1e-3)
        module(golden_inputs()[:3])


@pytest.mark.parametrize("pipeline", ["awq:samples=4", "awq:samples=4,bits=3,group_size=32"])
def test_every_architecture_is_saved_and_loaded_bit_for_bit(architecture: str, pipeline: str, tmp_path: Path) -> None:
    system = calibrated(random_system(architecture), pipeline)
    assert matrices(system.model) == []
    at_run_time = {name.split(".", 3)[-1] for name, m in system.model.named_modules() if isinstance(m, ScaledLinear)}
    behind_gelu = {"gpt2": {"mlp.c_proj"}, "gpt_neox": {"mlp.dense_4h_to_h"}}
    assert at_run_time == behind_gelu.get(architecture, set())
    if not at_run_time:  # folded scales cost nothing: the bytes are those of rounding to nearest
        rounded = calibrated(random_system(architecture), pipeline.replace("awq:samples=4", "rtn:mse=false"))
        assert stored_bytes(system) == stored_bytes(rounded)
    store.save(system, tmp_path / "taken_home", pipeline)
    again = store.load(tmp_path / "taken_home")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        before, after = (s.model(input_ids=ids).logits for s in (system, again))
    assert torch.equal(after, before) and torch.isfinite(after).all()
    assert stored_bytes(again) == stored_bytes(system)


def test_eight_bits_change_little_whatever_was_folded_where(architecture: str) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        dense = random_system(architecture, torch.float32).model(input_ids=ids).logits
        system = calibrated(random_system(architecture, torch.float32), "awq:bits=8,samples=4,scale_dtype=float32")
        packed = system.model(input_ids=ids).logits
    assert not torch.equal(packed, dense)
    assert (packed - dense).norm() / dense.norm() < 0.02


def test_queries_and_keys_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, awq = [], get("awq")
    real = awq._clipped
    monkeypatch.setattr(awq, "_clipped", lambda self, groups, *rest: cut.append(groups) or real(self, groups, *rest))
    block = calibrated(random_system("llama"), "awq:samples=4").model.model.layers[0]
    assert isinstance(block.self_attn.q_proj, PackedLinear)
    assert len(cut) == 2 * 5  # of seven matrices in each of two blocks


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    system = random_system("llama")
    system.model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(UnfitError, match=r"^model\.layers\.1\.mlp\.gate_proj: its calibration inputs are not all fin"):
        calibrated(system, "awq:samples=4")


@pytest.mark.parametrize("wrong", ["bits=0", "bits=9", "group_size=-1", "samples=0"])
def test_an_option_out_of_range_is_named_with_what_was_got(wrong: str) -> None:
    with pytest.raises(TechniqueError, match=f"{wrong.partition('=')[0]} must .*got {wrong.partition('=')[2]}"):
        parse(f"awq:{wrong}")


def test_where_channels_stand_out_it_loses_less_than_half_of_what_rounding_loses() -> None:
    nats = {}
    for pipeline in ("dense", "rtn:bits=4", "awq:bits=4,samples=8"):
        system = models.load("ref-1m@outliers")
        windows = WorldSource(system.tokenizer).evaluation(system.context, 24)
        if pipeline != "dense":
            system = calibrated(system, pipeline, system.context)
        quality = score(system, windows)
        nats[pipeline[:3]] = np.array(quality.nats) / np.array(quality.tokens)
    gain = (nats["rtn"] - nats["den"]) - 2 * (nats["awq"] - nats["den"])
    assert gain.mean() > 3 * gain.std(ddof=1) / len(gain) ** 0.5
