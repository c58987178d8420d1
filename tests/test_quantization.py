"""Round to nearest: the published error on the golden layer, fewer bits in the bytes, an order in the losses."""

import json
from pathlib import Path

import pytest
import torch
from conftest import applied, logits, random_system
from golden_layer import agrees, golden_inputs, golden_linear, output_error
from torch import nn

from effbench import models, store
from effbench.errors import TechniqueError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.registry import get, parse
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.walk import matrices


def test_the_golden_layer_is_the_one_whose_errors_are_known() -> None:
    weight, inputs = golden_linear().weight, golden_inputs()
    assert float(weight[0, 0]) == pytest.approx(0.08820262, abs=5e-9)
    assert float(weight.sum()) == pytest.approx(-4.711069, abs=2e-6)  # in float32, so the order of adding shows
    assert float(inputs[0, 0]) == pytest.approx(-0.76820850, abs=5e-8)
    assert float(inputs.abs().mean()) == pytest.approx(1.466390, abs=1e-6)
    assert float((inputs.double() @ weight.double().T).square().sum()) == pytest.approx(1.754533e6, rel=5e-7)


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"bits": 8}, "3.4496e-05"),
        ({"bits": 4}, "1.07102e-02"),
        ({"bits": 3}, "4.65956e-02"),
        ({"bits": 2}, "2.49363e-01"),
        ({"bits": 4, "group_size": 128}, "9.6193e-03"),
        ({"bits": 4, "group_size": 64}, "7.4297e-03"),
        ({"bits": 3, "group_size": 128}, "4.2465e-02"),
        ({"bits": 3, "group_size": 64}, "3.3646e-02"),
        ({"bits": 2, "group_size": 128}, "2.15334e-01"),
        ({"bits": 2, "group_size": 64}, "1.88121e-01"),
        ({"bits": 4, "symmetric": True}, "1.23346e-02"),
        ({"bits": 4, "mse": True}, "1.15721e-02"),
    ],
    ids=str,
)
def test_rtn_meets_the_errors_of_the_released_quantizer(options: dict, golden: str) -> None:
    packed = get("rtn")(**options, scale_dtype="float32").layer(golden_linear(), None)
    assert agrees(output_error(packed), golden)


def test_the_search_lessens_the_error_of_the_weights() -> None:
    weight = golden_linear().weight
    for symmetric in (False, True):
        plain, searched = (
            get("rtn")(bits=3, mse=mse, symmetric=symmetric).layer(golden_linear(), None).dequantized()
            for mse in (False, True)
        )
        lost, left = ((w - weight).abs().pow(2.4).sum(1) for w in (plain, searched))
        assert (left <= lost * 1.001).all() and left.sum() < 0.95 * lost.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_less_costs_error(dtype: torch.dtype) -> None:
    errors = []
    for bits in (8, 4, 3, 2):
        linear = golden_linear().to(dtype)
        x = golden_inputs()[:5].to(dtype)
        exact = linear(x).float()
        errors.append(float((get("rtn")(bits=bits).layer(linear, None)(x).float() - exact).norm() / exact.norm()))
    assert errors == sorted(errors) and errors[0] < 0.02


def test_the_bias_is_kept() -> None:
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    for bits in (8, 4, 2):
        packed = get("rtn")(bits=bits).layer(linear, None)
        assert torch.equal(packed(x), linear(x))
        assert torch.equal(packed(x.expand(200, 3, 64)), linear(x.expand(200, 3, 64)))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_architecture_gets_smaller_by_what_the_closed_form_says(architecture: str, bits: int) -> None:
    system = random_system(architecture)
    dense, found = stored_bytes(system), matrices(system.model)
    weights = {name: linear.weight.shape for name, linear in found}
    del found
    system = applied(system, f"rtn:bits={bits}")
    saved = 0.0
    for name, (rows, columns) in weights.items():
        module = system.model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        per_row = 32 if module.tile > 16 else 16 + bits
        expected_bytes = rows * (columns * bits + per_row) / 8
        assert module_bytes(module) == pytest.approx(expected_bytes, rel=1e-3)
        saved += rows * columns * 2 - expected_bytes
    assert len(weights) == {"llama": 14, "qwen3": 14, "mistral": 14, "gpt2": 8, "opt": 12, "gpt_neox": 8}[architecture]
    assert dense - stored_bytes(system) == pytest.approx(saved, rel=1e-3)
    assert torch.isfinite(logits(system)).all()


def test_eight_bits_change_little_in_any_architecture(architecture: str) -> None:
    dense = logits(random_system(architecture, torch.float32))
    packed = logits(applied(random_system(architecture, torch.float32), "rtn:bits=8,scale_dtype=float32"))
    assert not torch.equal(packed, dense)
    assert (packed - dense).norm() / dense.norm() < 0.02


@pytest.mark.parametrize("pipeline", ["rtn:bits=8", "rtn:bits=4", "rtn:bits=4,group_size=32", "rtn:bits=3"])
def test_a_saved_model_is_the_same_bit_for_bit(architecture: str, pipeline: str, tmp_path: Path) -> None:
    system = applied(random_system(architecture), pipeline)
    before, size = logits(system), stored_bytes(system)
    assert stored_bytes(system) == size
    store.save(system, tmp_path / "taken_home", pipeline)
    again = store.load(tmp_path / "taken_home")
    assert torch.equal(logits(again), before)
    assert stored_bytes(again) == size


def test_groups_that_do_not_divide_a_row_are_unfit_with_a_sentence() -> None:
    reason = get("rtn")(group_size=48).unfit(random_system("gpt2"))
    assert reason is not None and "its 64 inputs do not divide into groups of 48" in reason


def test_packing_twice_is_unfit() -> None:
    system = applied(random_system("llama"), "rtn")
    assert "no plain weight matrix" in (get("rtn")().unfit(system) or "")


@pytest.mark.parametrize("wrong", ["bits=5", "group_size=-1", "scale_dtype=int8"])
def test_an_option_out_of_range_is_named_with_what_was_got(wrong: str) -> None:
    with pytest.raises(TechniqueError, match=f"{wrong.partition('=')[0]} must .*got {wrong.partition('=')[2]}"):
        parse(f"rtn:{wrong}")


def test_real_stories_get_harder_to_predict_with_every_bit_less(stories: tuple[Path, Path]) -> None:
    folder, text = stories
    losses = []
    for bits in (16, 8, 4, 3, 2):
        system = models.load(str(folder), "bfloat16")
        texts = [json.loads(line)["text"] for line in text.read_text().splitlines()[:8]]
        if bits < 16:
            system = applied(system, f"rtn:bits={bits}")
        total, count = 0.0, 0
        with torch.inference_mode():
            for story in texts:
                ids = system.tokenizer(story, return_tensors="pt")["input_ids"][:, :256]
                scores = system.model(input_ids=ids).logits[0, :-1].float()
                total += float(nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum"))
                count += ids.shape[1] - 1
        losses.append(total / count)
    assert losses[1] < losses[0] + 0.01
    assert losses[1:] == sorted(losses[1:])
