"""QuaRot: transforms of any width, a model that says the same once turned, and grids that then fit better."""

import math
from pathlib import Path

import pytest
import torch
from conftest import applied, logits, random_system
from golden_layer import golden_inputs, golden_linear
from torch import nn

from effbench import models, store
from effbench.data import Data
from effbench.errors import TechniqueError, UnfitError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.reference.outliers import inject
from effbench.registry import get, parse
from effbench.technique import System
from effbench.toolbox.hadamard import factors, hadamard, turn
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.rotation import TurnedBackNorm, TurnedEmbedding, TurnedLinear, rotate, rounded_rows
from effbench.toolbox.walk import matrices


def test_a_matrix_that_the_model_reads_as_a_tensor_stays_one() -> None:
    system = applied(random_system("mamba", torch.float32), "quarot:bits=16,activation_bits=8")
    assert torch.isfinite(logits(system)).all()


TURNED = ("llama", "qwen3", "mistral")
"""Architectures whose residual stream can be turned; the others' norms subtract means."""


@pytest.mark.parametrize("size", [1, 2, 64, 12, 20, 24, 28, 36, 44, 60, 76, 108, 140, 148])
def test_hadamard_matrices_are_orthogonal_and_of_one_size(size: int) -> None:
    matrix = hadamard(size) * math.sqrt(size)
    assert torch.equal(matrix.round().abs(), torch.ones(size, size))
    assert torch.equal(matrix.round() @ matrix.round().T, size * torch.eye(size))


def test_a_size_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of this size"):
        hadamard(172)


@pytest.mark.parametrize(
    ("width", "blocks"),
    [(1, 1), (33, 33), (6, 3), (64, 1), (192, 1), (384, 1), (768, 1), (2752, 43), (4096, 1), (11008, 43), (14336, 1)],
)
def test_any_width_is_transformed_and_comes_back(width: int, blocks: int) -> None:
    assert width == blocks * math.prod(factors(width))
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0))
    turned = turn(x)
    torch.testing.assert_close(turn(turned, back=True), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    one = torch.zeros(width)
    one[width // 2] = 1
    spread = width // blocks  # a number ends in equal shares in all places of its block
    assert sorted(turn(one).abs().round(decimals=4).tolist())[-spread:] == pytest.approx(
        [spread**-0.5] * spread, abs=1e-4
    )


def kurtosis(x: torch.Tensor) -> float:
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


def test_outliers_of_the_golden_inputs_are_gone_once_turned() -> None:
    x = golden_inputs()
    peaks = [float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean()) for rows in (x, turn(x))]
    assert kurtosis(x) == pytest.approx(268, abs=0.5) and kurtosis(turn(x)) == pytest.approx(3.04, abs=0.005)
    assert peaks == pytest.approx([11.23, 2.48], abs=0.005)


def with_lively_norms(architecture: str) -> System:
    """A random model whose norms' weights are not all 1, as those of trained ones are not."""
    system = random_system(architecture, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in system.model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return system


def test_a_turned_model_says_the_same(architecture: str) -> None:
    system = with_lively_norms(architecture)
    before = logits(system)
    weights = {name: linear.weight.clone() for name, linear in matrices(system.model)}
    assert rotate(system.model, 0) == (architecture in TURNED)
    assert (logits(system) - before).norm() <= 1e-4 * before.norm()
    after = {name.replace(".inner", ""): linear.weight for name, linear in matrices(system.model)}
    assert weights.keys() == after.keys()
    assert not any(torch.allclose(weights[name], after[name], atol=1e-3) for name in weights)


@pytest.mark.parametrize("untied", [False, True])
def test_the_head_stays_as_it_is_and_goes_on_sharing_its_table(untied: bool) -> None:
    model = models.load("ref-70k", "float32").model
    if untied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 1.5, requires_grad=False)
    head, ids = model.lm_head.weight, torch.arange(3, 40)[None]
    before = model(ids).logits
    assert rotate(model, 3)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, TurnedEmbedding) and isinstance(model.model.norm, TurnedBackNorm)
    assert model.lm_head.weight is head and (embedding.weight is head) != untied
    after = model(ids).logits
    assert (after - before).norm() <= 1e-4 * before.norm()


def test_other_signs_give_other_weights_and_the_same_logits() -> None:
    first, second, third = (random_system("llama", torch.float32) for _ in range(3))
    for system, seed in ((first, 0), (second, 0), (third, 1)):
        rotate(system.model, seed)
    weights = [matrices(system.model)[0][1].weight for system in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-3)
    assert (logits(first) - logits(third)).norm() <= 1e-4 * logits(first).norm()


def test_outlier_channels_between_norm_and_matrices_leave_no_trace() -> None:
    plain, stressed = (models.load("ref-300k", "bfloat16") for _ in range(2))
    inject(stressed.model)
    for system in (plain, stressed):
        rotate(system.model, 0)
    for (name, one), (_, other) in zip(matrices(plain.model), matrices(stressed.model), strict=True):
        assert torch.equal(one.weight, other.weight), name


class Extra(nn.Module):
    """A norm's reader that also lets another part of the stream pass, as a gate beside the matrices would."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found * (1 + x[..., :1].sigmoid())


def test_a_stream_that_something_else_reads_is_refused_with_a_sentence() -> None:
    system = models.load("ref-300k", "float32")
    for layer in system.model.model.layers:
        layer.mlp = Extra(layer.mlp)
    with pytest.raises(UnfitError, match="reads or writes its residual stream"):
        rotate(system.model, 0)


def outliers_loss(pipeline: str, texts: torch.Tensor) -> float:
    system = models.load("ref-300k@outliers")
    data = Data(None, context=64, load=lambda name: pytest.fail(name))
    for technique in parse(pipeline):
        assert technique.unfit(system) is None
        system = technique.apply(system, data)
    with torch.inference_mode():
        scores = system.model(input_ids=texts).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten()))


def test_turned_weights_and_inputs_bear_rounding_better_where_there_are_outliers() -> None:
    system = models.load("ref-300k")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 900, (16, 8), generator=generator)
    texts = system.generate(system, prompts, 120, temperature=1.0, seed=0).ids  # what the model itself finds likely
    dense = outliers_loss("dense", texts)
    for bits in (4, 3):
        turned = outliers_loss(f"quarot:bits={bits},method=rtn", texts)
        plain = outliers_loss(f"rtn:bits={bits}", texts)
        assert abs(turned - dense) < 0.6 * (plain - dense)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_stored_bits_meet_the_closed_form_and_are_kept(architecture: str, bits: int, tmp_path: Path) -> None:
    pipeline = f"quarot:bits={bits},method=rtn"
    system = random_system(architecture)
    shapes = {name: linear.weight.shape for name, linear in matrices(system.model)}
    system = applied(system, pipeline)
    before, size = logits(system), stored_bytes(system)
    for name, (rows, columns) in shapes.items():
        module = system.model.get_submodule(name)
        packed = module.inner if isinstance(module, TurnedLinear) else module
        assert isinstance(packed, PackedLinear)
        assert module_bytes(module) == pytest.approx(
            rows * (columns * bits + (32 if packed.tile > 16 else 16)) / 8, rel=1e-3
        )
    store.save(system, tmp_path / "home", pipeline)
    again = store.load(tmp_path / "home")
    assert torch.equal(logits(again), before) and stored_bytes(again) == size


def test_rounded_inputs_are_taken_home_too(architecture: str, tmp_path: Path) -> None:
    pipeline = "quarot:bits=4,method=rtn,activation_bits=4,clip=0.9"
    system = applied(random_system(architecture), pipeline)
    before = logits(system)
    rounding = [module for module in system.model.modules() if isinstance(module, TurnedLinear)]
    assert len(rounding) == sum(isinstance(module, PackedLinear) for module in system.model.modules())
    assert {(module.activation_bits, module.clip) for module in rounding} == {(4, 0.9)}
    assert not torch.equal(before, logits(applied(random_system(architecture), "quarot:bits=4,method=rtn")))
    store.save(system, tmp_path / "home", pipeline)
    assert torch.equal(logits(store.load(tmp_path / "home")), before)


@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 1.0), (4, 0.9), (2, 1.0)])
def test_rows_are_rounded_to_so_many_levels(bits: int, clip: float) -> None:
    x = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    rounded = rounded_rows(x, bits, clip)
    most = 2 ** (bits - 1) - 1
    for before, after in zip(x, rounded, strict=True):
        step = float(before.abs().max()) * clip / most
        codes = after / step
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert -most - 1.001 <= codes.min() and codes.max() <= most + 0.001
        inside = before.abs() <= most * step
        assert ((after - before).abs()[inside] <= step * 0.5001).all()
    assert (rounded_rows(torch.zeros(2, 8), bits) == 0).all()
    x.requires_grad_(True)
    rounded_rows(x, bits, clip).sum().backward()
    assert x.grad is not None and (x.grad == 1).all()


def turned_layer() -> tuple[TurnedLinear, torch.Tensor, torch.Tensor]:
    linear, x = golden_linear(), golden_inputs()[:512]
    module = TurnedLinear.of(linear)
    return module, x, linear(x)


def test_a_turned_layer_says_the_same_and_bears_four_bit_inputs() -> None:
    module, x, exact = turned_layer()
    assert (module(x) - exact).norm() < 1e-5 * exact.norm()
    rounding = TurnedLinear.around(module.inner, activation_bits=4)
    errors = [
        float((found - exact).square().sum() / exact.square().sum())
        for found in (rounding(x), golden_linear()(rounded_rows(x, 4)))
    ]
    assert errors[0] < 0.25 * errors[1]


def test_gptq_on_turned_inputs_errs_less_than_rounding() -> None:
    module, x, exact = turned_layer()
    assert isinstance(module.inner, nn.Linear)
    errors = []
    for method in ("gptq", "rtn"):
        technique = get("quarot")(bits=3, method=method)
        packed = TurnedLinear.around(technique.packed(module.inner, turn(x)))  # type: ignore[attr-defined]
        errors.append(float((packed(x) - exact).square().sum()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(
    "wrong", ["bits=5", "method=awq", "group_size=-1", "activation_bits=1", "clip=2", "damping=-1", "samples=0"]
)
def test_an_option_out_of_range_is_named_with_what_was_got(wrong: str) -> None:
    with pytest.raises(TechniqueError, match=f"{wrong.partition('=')[0]} must .*got {wrong.partition('=')[2]}"):
        parse(f"quarot:{wrong}")


def test_packed_weights_cannot_be_turned() -> None:
    system = applied(random_system("llama"), "rtn")
    assert "no plain weight matrix" in (get("quarot")().unfit(system) or "")
    assert "groups of 48" in (get("quarot")(group_size=48).unfit(random_system("llama")) or "")
