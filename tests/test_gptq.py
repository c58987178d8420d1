"""GPTQ: the published errors, exact invariants, bytes by the closed form, and less harm than rounding to nearest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated_layers import DEAD, LAYERS, calibrated_layer, computed, relative_error
from conftest import calibrated, random_system
from golden_layer import agrees, golden_inputs, golden_linear, output_error
from torch import nn

from effbench import models, store
from effbench.data import WorldSource
from effbench.errors import TechniqueError, UnfitError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.measure.quality import score
from effbench.registry import get, parse
from effbench.toolbox.walk import matrices

GOLDEN = {
    "": ("1.9426e-05", "5.9814e-03", "2.6376e-02", "1.5278e-01"),
    "act_order": ("1.0264e-05", "3.2645e-03", "1.4514e-02", "1.0162e-01"),
    "group_size=128": ("", "5.4009e-03", "2.7000e-02", "2.1879e-01"),
    "group_size=64": ("", "4.3795e-03", "2.1336e-02", "1.7220e-01"),
    "group_size=64,block_size=64": ("", "4.5664e-03", "2.2522e-02", "2.0734e-01"),
    "group_size=128,act_order,static_groups": ("", "2.9618e-03", "1.3637e-02", "8.8374e-02"),
    "group_size=128,act_order": ("", "2.7738e-03", "1.3488e-02", "8.4133e-02"),
}
"""Errors of the released code on the golden layer at 8, 4, 3 and 2 bits."""


def options(text: str) -> dict:
    parts = [part.partition("=") for part in text.split(",") if part]
    return {name: (float(value) if "." in value else int(value)) if value else True for name, _, value in parts}


@pytest.mark.parametrize(
    ("text", "bits", "golden"),
    [(t, b, g) for t, row in GOLDEN.items() for b, g in zip((8, 4, 3, 2), row, strict=True) if g],
)
def test_it_meets_the_errors_of_the_released_code(text: str, bits: int, golden: str) -> None:
    technique = get("gptq")(bits=bits, **options(text), scale_dtype="float32")
    assert agrees(output_error(technique.layer(golden_linear(), golden_inputs())), golden, 1e-3)


# from running IST-DASLab/gptq at 2d65066 (gptq.GPTQ.fasterquant with quant.Quantizer) on these layers, in float32
FURTHER = {
    "bits=4": ("3.21483e-03", "4.38297e-03", "1.17164e-03"),
    "bits=3,act_order": ("9.40714e-03", "2.03851e-02", "2.82217e-03"),
    "bits=3,group_size=32": ("1.03450e-02", "1.31032e-02", "3.28631e-03"),
    "bits=2,group_size=32,act_order": ("4.78837e-02", "5.67290e-02", "1.49869e-02"),
    "bits=4,group_size=32,act_order,static_groups": ("1.41539e-03", "2.30396e-03", "3.94538e-04"),
    "bits=4,symmetric": ("3.81864e-03", "5.20749e-03", "1.33344e-03"),
    "bits=3,damping=0.1,block_size=32": ("2.00418e-02", "3.86084e-02", "1.58352e-02"),
}


@pytest.mark.parametrize("seed", LAYERS)
@pytest.mark.parametrize("text", FURTHER)
def test_it_meets_the_released_code_on_other_layers_too(text: str, seed: int) -> None:
    linear, inputs = calibrated_layer(seed)
    weight = linear.weight.clone()
    module = get("gptq")(**options(text), scale_dtype="float32").layer(linear, inputs)
    error = relative_error(weight, computed(module, weight.shape[1]), inputs)
    assert agrees(error, FURTHER[text][seed - 1], 1e-3)


def test_the_block_size_changes_no_code() -> None:
    packed = [
        get("gptq")(bits=3, block_size=size, act_order=order).layer(golden_linear(), golden_inputs())
        for order in (False, True)
        for size in (1, 100, 128, 256)
    ]
    for some in (packed[:4], packed[4:]):
        assert all(torch.equal(module.codes, some[0].codes) for module in some[1:])
    assert not torch.equal(packed[0].codes, packed[4].codes)


@pytest.mark.parametrize("text", ["", "group_size=64", "group_size=64,symmetric", "group_size=64,static_groups"])
def test_much_damping_is_plain_rounding(text: str) -> None:
    plain = {name: value for name, value in options(text).items() if name != "static_groups"}
    rounded = get("rtn")(bits=3, **plain).layer(golden_linear(), None)
    damped = get("gptq")(bits=3, damping=1e6, **options(text)).layer(golden_linear(), golden_inputs())
    assert torch.equal(damped.dequantized(), rounded.dequantized())


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    rounded = get("rtn")().layer(golden_linear(), None)
    assert torch.equal(get("gptq")().layer(golden_linear(), torch.eye(256)).dequantized(), rounded.dequantized())


def test_an_input_that_is_always_zero_gets_zero_weights() -> None:
    linear, inputs = calibrated_layer(2)
    stored = get("gptq")(bits=4).layer(linear, inputs).dequantized()
    assert (stored[:, list(DEAD[2])] == 0).all() and (stored != 0).any(0).sum() == stored.shape[1] - len(DEAD[2])


def test_a_row_of_zeros_stays_one() -> None:
    linear = golden_linear()
    linear.weight[7] = 0
    for bits in (8, 4, 3, 2):
        assert (get("gptq")(bits=bits).layer(linear, golden_inputs()).dequantized()[7] == 0).all()


def test_too_few_inputs_without_damping_are_refused_with_a_sentence() -> None:
    linear, inputs = calibrated_layer(3)
    with pytest.raises(UnfitError, match="do not span enough directions for damping 0; use more samples or more damp"):
        get("gptq")(damping=0).layer(linear, inputs)


@pytest.mark.parametrize(
    ("text", "per_group", "width", "order"),
    [
        ("bits=4", 20, 256, 0),
        ("bits=3,group_size=64", 19, 64, 0),
        ("bits=2,group_size=32,symmetric", 16, 32, 0),
        ("bits=4,group_size=64,act_order,static_groups", 20, 64, 0),
        ("bits=4,group_size=64,act_order", 20, 64, 32),
        ("bits=8,act_order", 24, 256, 0),
    ],
)
def test_stored_bits_meet_the_closed_form(text: str, per_group: int, width: int, order: int) -> None:
    bits = options(text)["bits"]
    module = get("gptq")(**options(text)).layer(golden_linear(), golden_inputs())
    expected = bits + per_group / width + order / 64
    for _ in range(2):
        assert module_bytes(module) * 8 / (64 * 256) == pytest.approx(expected, rel=1e-3)
        module(golden_inputs()[:3])


@pytest.mark.parametrize(
    "pipeline",
    ["gptq:samples=4", "gptq:samples=4,bits=4,group_size=32,act_order=true", "gptq:samples=4,bits=3,act_order=true"],
)
def test_every_architecture_is_saved_and_loaded_bit_for_bit(architecture: str, pipeline: str, tmp_path: Path) -> None:
    dense = random_system(architecture)
    system = calibrated(random_system(architecture), pipeline)
    assert matrices(system.model) == [] and stored_bytes(system) < stored_bytes(dense)
    store.save(system, tmp_path / "taken_home", pipeline)
    again = store.load(tmp_path / "taken_home")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        before, after = (s.model(input_ids=ids).logits for s in (system, again))
    assert torch.equal(after, before) and torch.isfinite(after).all()
    assert stored_bytes(again) == stored_bytes(system)


def test_true_sequential_sees_the_quantized_matrices_of_its_own_block() -> None:
    plain, sequential = (
        calibrated(random_system("llama"), f"gptq:bits=2,samples=4,true_sequential={value}").model.model.layers[0]
        for value in ("false", "true")
    )
    assert torch.equal(plain.self_attn.q_proj.codes, sequential.self_attn.q_proj.codes)
    assert not torch.equal(plain.self_attn.o_proj.codes, sequential.self_attn.o_proj.codes)


@pytest.mark.parametrize("wrong", ["bits=0", "bits=9", "damping=-1", "block_size=0", "group_size=-1", "samples=0"])
def test_an_option_out_of_range_is_named_with_what_was_got(wrong: str) -> None:
    with pytest.raises(TechniqueError, match=f"{wrong.partition('=')[0]} must .*got {wrong.partition('=')[2]}"):
        parse(f"gptq:{wrong}")


def test_groups_that_do_not_divide_a_row_are_unfit_with_a_sentence() -> None:
    reason = get("gptq")(group_size=48).unfit(random_system("gpt2"))
    assert reason is not None and "its 64 inputs do not divide into groups of 48" in reason


def test_inputs_are_needed() -> None:
    with pytest.raises(ValueError, match="needs calibration inputs, got none"):
        get("gptq")().layer(nn.Linear(8, 8), None)


@pytest.mark.parametrize("bits", [3, 2])
def test_it_harms_a_trained_model_less_than_rounding(bits: int) -> None:
    nats = {}
    for pipeline in (f"rtn:bits={bits}", f"gptq:bits={bits},samples=32"):
        system = models.load("ref-1m")
        windows = WorldSource(system.tokenizer).evaluation(system.context, 24)
        quality = score(calibrated(system, pipeline, system.context), windows)
        nats[pipeline[:4]] = np.array(quality.nats) / np.array(quality.tokens)
    gain = nats["rtn:"] - nats["gptq"]
    assert gain.mean() > 5 * gain.std(ddof=1) / len(gain) ** 0.5
