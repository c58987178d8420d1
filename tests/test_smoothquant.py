"""SmoothQuant: the published errors, products of whole numbers, and a best alpha between the ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated_layers import LAYERS, calibrated_layer
from conftest import calibrated, random_system
from golden_layer import agrees, golden_inputs, golden_linear
from torch import Tensor, nn

from effbench import models, store
from effbench.coverage import VOCABULARY
from effbench.data import WorldSource
from effbench.errors import TechniqueError, UnfitError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.registry import get, parse
from effbench.technique import System
from effbench.toolbox import int8
from effbench.toolbox.int8 import Int8Linear
from effbench.toolbox.walk import compress_blocks, matrices


@torch.no_grad()
def output_error(module: nn.Module, linear: nn.Linear, inputs: Tensor) -> float:
    """The squared error of the outputs, relative to the outputs squared, in float64; inputs are rounded, too."""
    exact = inputs.double() @ linear.weight.double().T
    return float((module(inputs).double() - exact).square().sum() / exact.square().sum())


GOLDEN = {0.25: "1.6437e-4", 0.5: "7.0916e-5", 0.75: "1.9964e-4", 0.85: "3.8826e-4", 1.0: "1.2148e-3"}


@pytest.mark.parametrize("alpha", GOLDEN)
def test_it_meets_the_errors_of_the_released_code(alpha: float) -> None:
    module = get("smoothquant")(alpha=alpha, scale_dtype="float32").layer(golden_linear(), golden_inputs())
    assert agrees(output_error(module, golden_linear(), golden_inputs()), GOLDEN[alpha])


def test_without_smoothing_it_is_eight_bits_by_output_and_by_token() -> None:
    module = Int8Linear.pack(golden_linear(), "float32")
    assert agrees(output_error(module, golden_linear(), golden_inputs()), "7.9226e-04")


# from running mit-han-lab/smoothquant at c61476d on these layers, in float32: smooth_ln_fcs on a fresh LayerNorm, then
# quantize_weight_per_channel_absmax and quantize_activation_per_token_absmax
FURTHER = {
    0.3: ("7.80829e-05", "1.66834e-04", "1.39251e-04"),
    0.5: ("5.55113e-05", "8.74392e-05", "9.50164e-05"),
    0.8: ("1.39285e-04", "2.94032e-04", "2.65104e-04"),
}


@pytest.mark.parametrize("seed", LAYERS)
@pytest.mark.parametrize("alpha", FURTHER)
def test_it_meets_the_released_code_on_other_layers_too(alpha: float, seed: int) -> None:
    linear, inputs = calibrated_layer(seed)
    module = get("smoothquant")(alpha=alpha, scale_dtype="float32").layer(linear, inputs)
    assert agrees(output_error(module, linear, inputs), FURTHER[alpha][seed - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_its_product_is_that_of_whole_numbers(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(72, 24, dtype=dtype)
    module = Int8Linear.pack(linear)
    x = torch.randn(rows, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    calls: list[Any] = []
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *args: calls.append([tensor.dtype for tensor in args]) or real(*args))
    with torch.no_grad():
        found = module(x)
    assert calls == [[torch.int8, torch.int8]] and found.dtype == dtype
    steps = x.float().abs().amax(-1, keepdim=True) / 127
    sums = (x.float() / steps).round().long() @ module.codes.long().T
    exact = sums.double() * steps * module.scales.double() + linear.bias.double()
    torch.testing.assert_close(found, exact.detach().to(dtype))
    monkeypatch.setattr(int8, "multiplies_int8", lambda *_: False)
    with torch.no_grad():
        torch.testing.assert_close(module(x), found)


def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = nn.Linear(16, 8)
    linear.weight.data[3] = 0
    module = Int8Linear.pack(linear)
    assert torch.equal(module(torch.zeros(2, 3, 16)), linear.bias.expand(2, 3, 8))
    assert torch.equal(module(torch.randn(2, 3, 16))[..., 3], linear.bias[3].expand(2, 3))


def test_gradients_pass_straight_through_the_rounding() -> None:
    linear = golden_linear()
    x = golden_inputs()[:4].requires_grad_()
    Int8Linear.pack(linear, "float32")(x).sum().backward()
    assert x.grad is not None
    assert (x.grad - linear.weight.sum(0)).norm() / linear.weight.sum(0).norm() < 0.02


def test_stored_bits_meet_the_closed_form() -> None:
    module = Int8Linear.pack(golden_linear())
    for _ in range(2):
        assert module_bytes(module) * 8 / (64 * 256) == pytest.approx(8 + 16 / 256, rel=1e-3)
        module(golden_inputs()[:3])


def test_every_architecture_is_saved_and_loaded_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    dense = random_system(architecture)
    before = stored_bytes(dense)
    found = [linear.weight.shape for _, linear in matrices(dense.model)]
    saved = sum(rows * columns - 2 * rows for rows, columns in found)
    del dense
    system = calibrated(random_system(architecture), "smoothquant:samples=4")
    assert matrices(system.model) == [] and stored_bytes(system) == before - saved
    store.save(system, tmp_path / "taken_home", "smoothquant")
    again = store.load(tmp_path / "taken_home")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        one, two = (s.model(input_ids=ids).logits for s in (system, again))
    assert torch.equal(one, two) and torch.isfinite(one).all()
    assert stored_bytes(again) == stored_bytes(system)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_it_changes_little_in_any_architecture(architecture: str, alpha: float) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        dense = random_system(architecture, torch.float32).model(input_ids=ids).logits
        system = calibrated(random_system(architecture, torch.float32), f"smoothquant:alpha={alpha},samples=4")
        found = system.model(input_ids=ids).logits
    assert not torch.equal(found, dense)
    assert (found - dense).norm() / dense.norm() < 0.03


def test_a_model_whose_norms_feed_more_than_matrices_is_unfit_with_a_reason() -> None:
    config = transformers.OPTConfig(
        **VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        do_layer_norm_before=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnfitError, match="no norm gives the inputs of matrices and of nothing else"):
        calibrated(System.dense(model, random_system("opt").tokenizer), "smoothquant:samples=4")


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    system = random_system("llama")
    system.model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(UnfitError, match=r"^model\.layers\.1\.mlp\.gate_proj: its calibration inputs are not all fin"):
        calibrated(system, "smoothquant:samples=4")


@pytest.mark.parametrize("wrong", ["alpha=-0.1", "alpha=1.5", "samples=0", "scale_dtype=int8"])
def test_an_option_out_of_range_is_named_with_what_was_got(wrong: str) -> None:
    with pytest.raises(TechniqueError, match=f"{wrong.partition('=')[0]} must .*got {wrong.partition('=')[2]}"):
        parse(f"smoothquant:{wrong}")


@torch.inference_mode()
def divergence(pipeline: str, variant: str, dense: Tensor, ids: Tensor) -> Tensor:
    """Divergence from the dense predictions, the mean of each window of `ids`; "" is 8 bits without smoothing."""
    system = models.load(f"ref-1m{variant}")
    if pipeline:
        system = calibrated(system, pipeline, system.context)
    else:
        compress_blocks(system.model, lambda linear, _: Int8Linear.pack(linear), None)
    found = system.model(input_ids=ids).logits.float().log_softmax(-1)
    return (dense.exp() * (dense - found)).sum(-1).mean(1)


def test_smoothing_undoes_channels_that_stand_out_in_a_trained_model() -> None:
    system = models.load("ref-1m")
    ids = torch.stack([torch.from_numpy(row) for row in WorldSource(system.tokenizer).evaluation(256, 16).ids])
    with torch.inference_mode():
        dense = system.model(input_ids=ids).logits.float().log_softmax(-1)
    plain, outliers = (divergence("", variant, dense, ids) for variant in ("", "@outliers"))
    assert outliers.mean() > 5 * plain.mean()
    smooth = [
        divergence(f"smoothquant:alpha={alpha},samples=8", variant, dense, ids)
        for alpha in (0.5, 0)
        for variant in ("", "@outliers")
    ]
    # scales follow any power of two that was moved from a norm to its readers, whatever alpha is
    for same, again in (smooth[:2], smooth[2:]):
        assert (same.mean() - again.mean()).abs() < 0.05 * same.mean()
    assert smooth[1].mean() < 0.2 * outliers.mean()
    gain = smooth[3] - smooth[1]
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
