"""LoSparse and BitStack: low rank with something beside it, the published choices, bytes that are the closed form."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated_layers import LAYERS, calibrated_layer, computed, relative_error
from conftest import logits, random_system
from counting import CountingSource
from golden_layer import agrees, golden_inputs, golden_linear
from torch import nn

from effbench import store
from effbench.data import Data
from effbench.measure.memory import stored_bytes
from effbench.registry import get
from effbench.technique import System
from effbench.toolbox.bitstack import BitStackLinear
from effbench.toolbox.low_rank import Directions, LowRankLinear
from effbench.toolbox.low_rank_rows import LowRankRowsLinear, RowImportance, most_important
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.walk import matrices

GOLDEN = ("0.25324", "4.5701e-2", "9.6789e-3", "1.9147e-3", "4.0065e-4", "8.505e-5", "1.942e-5", "4.494e-6")
"""BitStack of rank 16 on the golden layer, by the number of blocks; on two threads."""
PUBLISHED = {
    1: (2.542892e-01, 4.734313e-02, 1.167982e-02, 2.803905e-03, 6.694371e-04, 2.010755e-04),
    2: (3.276659e-01, 9.348194e-02, 3.500033e-02, 1.515961e-02, 7.834582e-03, 4.749547e-03),
    3: (2.971050e-01, 8.760953e-02, 2.402099e-02, 8.426186e-03, 3.032667e-03, 1.197888e-03),
}
"""The same of rank 8 on the layers of `calibrated_layers`: xinghaow99/BitStack 9f333d6, on one thread."""
RELATIVE = (2e-5, 2e-4, 5e-4, 1e-3, 1e-3, 5e-3, 1e-2, 1e-2)
"""Twice what another number of threads changes on the golden layer: a last bit turns the sign of a weight that is all
but zero, and what follows is made from signs."""
SAME = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.__version__.startswith("2.13.")
"""Whether sums are formed here, with as many threads, in the order in which the released code formed them."""
LOW_RANK_PART = {1: 7.026781e-01, 2: 7.461904e-01, 3: 7.503326e-01}
"""Errors of the factors alone at a share of .15 of the parameters: yxli2123/LoSparse 7513452."""


def text() -> Data:
    """Text of counting words."""
    return Data(CountingSource(), context=24, load=lambda name: pytest.fail(name))


class OneWord(CountingSource):
    """Text of one word over and over, so that it reaches few experts."""

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        return np.full((count, length), 5)


def kept(system: System, folder: Path) -> System:
    """`system` saved and loaded, which changed neither what it computes nor what it stores."""
    before, size = logits(system), stored_bytes(system)
    store.save(system, folder / "taken_home", "test")
    again = store.load(folder / "taken_home")
    assert torch.isfinite(before).all()
    assert torch.equal(logits(again), before)
    assert stored_bytes(again) == size
    return again


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bitstack_meets_the_golden_errors(threads: Callable[[int], None]) -> None:
    threads(2)
    stack = BitStackLinear.stack(golden_linear(), 16, 8)
    for blocks, (error, relative) in enumerate(zip(GOLDEN, RELATIVE, strict=True), 1):
        found = relative_error(golden_linear().weight, stack.weight_of(blocks), golden_inputs())
        assert agrees(found, error, 1e-5 if SAME else relative)


@pytest.mark.parametrize("seed", sorted(LAYERS))
def test_bitstack_has_the_errors_of_the_released_code(seed: int, threads: Callable[[int], None]) -> None:
    threads(1)
    linear, inputs = calibrated_layer(seed)
    stack = BitStackLinear.stack(linear, 8, 6)
    for blocks, error in enumerate(PUBLISHED[seed], 1):
        found = relative_error(linear.weight, stack.weight_of(blocks), inputs)
        assert found == pytest.approx(error, rel=1e-5 if SAME else RELATIVE[blocks - 1])


def test_every_block_lessens_what_is_missing() -> None:
    stack = BitStackLinear.stack(golden_linear(), 16, 8)
    weight = golden_linear().weight
    missing = [float((weight - stack.weight_of(blocks)).norm() / weight.norm()) for blocks in range(9)]
    assert all(after < 0.6 * before for before, after in pairwise(missing))
    assert missing[1:5] == pytest.approx([0.4615, 0.2099, 0.0975, 0.0453], abs=1e-4)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_first_blocks_are_the_smaller_stack_bit_for_bit(blocks: int) -> None:
    linear = golden_linear()
    linear.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    scales = golden_inputs().square().mean(0).sqrt()
    whole, small = (BitStackLinear.stack(linear, 16, count, scales) for count in (6, blocks))
    cut = whole.first(blocks)
    assert cut.options == small.options
    assert all(torch.equal(tensor, dict(small.named_buffers())[name]) for name, tensor in cut.named_buffers())
    assert torch.equal(cut(golden_inputs()), small(golden_inputs()))
    assert cut.left.untyped_storage().nbytes() == 2 * blocks * 64 * 16  # nothing of the longer stack is held


def test_scales_of_inputs_cost_nothing_and_lessen_the_outputs_error() -> None:
    linear, inputs = golden_linear(), golden_inputs()
    plain = BitStackLinear.stack(linear, 16, 2)
    scaled = get("bitstack")(blocks=2).layer(linear, inputs)
    assert sum(b.nbytes for b in scaled.buffers()) == sum(b.nbytes for b in plain.buffers())
    errors = [relative_error(linear.weight, layer.weight_of(2), inputs) for layer in (plain, scaled)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("share", [1, 0.9, 0.81])
def test_blocks_are_loaded_up_to_the_budget(share: float, architecture: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    shapes = {name: linear.weight.shape for name, linear in matrices(system.model)}
    dense = stored_bytes(system)
    fixed = dense - sum(2 * shape.numel() for shape in shapes.values())
    budget = int(share * dense)
    technique = get("bitstack")(megabytes=0 if share == 1 else budget / 1e6, rank=2, samples=2)
    assert technique.unfit(system) is None
    system = kept(technique.apply(system, text()), tmp_path)
    stacks = {name: system.model.get_submodule(name) for name in shapes}
    bits = sum(
        stack.blocks * (shape.numel() + 16 * 2 * sum(shape))
        for stack, shape in zip(stacks.values(), shapes.values(), strict=True)
    )
    assert stored_bytes(system) == pytest.approx(fixed + bits / 8, rel=1e-3)
    held = {stack.blocks for stack in stacks.values()}
    assert max(held) - min(held) <= 1
    dearest = max(shape.numel() + 16 * 2 * sum(shape) for shape in shapes.values()) / 8
    assert max(held) == 16 or budget - dearest < stored_bytes(system) <= budget


@pytest.mark.parametrize("kind", ["shared", "idle"])
def test_a_budget_holds_where_matrices_are_shared_or_never_reached(kind: str) -> None:
    system = random_system("llama" if kind == "shared" else "qwen3_moe", torch.float32)
    if kind == "shared":
        system = get("fold")(sparsity=0.0, group_size=2).apply(system, text())
    budget = int(0.9 * stored_bytes(system))
    technique = get("bitstack")(megabytes=budget / 1e6, rank=2, samples=2)
    source = CountingSource() if kind == "shared" else OneWord()
    system = technique.apply(system, Data(source, context=24, load=lambda name: pytest.fail(name)))
    assert stored_bytes(system) <= budget


def test_a_budget_below_one_block_says_what_there_would_have_to_be() -> None:
    reason = get("bitstack")(megabytes=0.2).unfit(random_system("llama"))
    assert reason is not None and "more than the 0.200 MB there are; raise megabytes or lower rank" in reason


@pytest.mark.parametrize("seed", sorted(LAYERS))
def test_losparse_starts_as_the_matrix_with_the_released_factors(seed: int) -> None:
    linear, inputs = calibrated_layer(seed)
    rank = get("losparse")(keep=0.5, low_rank=0.15)._rank(linear)
    factors = Directions.of(linear.weight).factors(linear, rank)
    whole = LowRankRowsLinear.whole(factors, linear.weight)
    torch.testing.assert_close(computed(whole, linear.in_features), linear.weight.detach(), rtol=0, atol=1e-6)
    none = whole.only(torch.zeros(linear.out_features, dtype=torch.bool))
    assert type(none) is LowRankLinear
    error = relative_error(linear.weight, computed(none, linear.in_features), inputs)
    assert error == pytest.approx(LOW_RANK_PART[seed], rel=1e-5)


def test_rows_that_are_kept_are_the_matrix_itself() -> None:
    linear = golden_linear()
    linear.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    chosen = torch.arange(64) % 3 == 0
    factors = Directions.of(linear.weight).factors(linear, 4)
    layer = LowRankRowsLinear.whole(factors, linear.weight).only(chosen)
    outputs, dense = layer(golden_inputs()[:9]), linear(golden_inputs()[:9])
    torch.testing.assert_close(outputs[:, chosen], dense[:, chosen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[:, ~chosen], factors(golden_inputs()[:9])[:, ~chosen], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[:, ~chosen], dense[:, ~chosen], atol=0.1)


def test_importance_is_smoothed_as_in_the_released_code() -> None:
    """The pruner of yxli2123/LoSparse 7513452 (beta1 .85, deltaT 10), fed the same weights and gradients."""
    random = np.random.RandomState(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal((rows, columns))).float()

    weights = [nn.Parameter(draw(6, 12)), nn.Parameter(draw(10, 8))]
    importance = RowImportance(weights, 0.85, 10)
    for _ in range(40):
        for weight in weights:
            weight.grad = None
            slope = draw(*weight.shape) * torch.arange(1, len(weight) + 1)[:, None]
            (weight * slope).sum().backward()
        importance.step()
    importance.close()
    expected = ([0.359257, 0.601598, 1.119451], [0.256498, 0.794053, 0.814189])
    for smoothed, values in zip(importance.smoothed, expected, strict=True):
        assert smoothed[:3].tolist() == pytest.approx(values, abs=1e-6)


def test_the_most_important_rows_of_all_matrices_fill_the_budget() -> None:
    importance = [torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4.0, 2.0])]
    first, second = most_important(importance, [10, 20], 45)
    assert first.tolist() == [True, False, True] and second.tolist() == [True, False]
    assert not any(rows.any() for rows in most_important(importance, [10, 20], 9))


def test_losparse_stores_what_it_keeps(architecture: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    shapes = {name: linear.weight.shape for name, linear in matrices(system.model)}
    fixed = stored_bytes(system) - sum(2 * shape.numel() for shape in shapes.values())
    technique = get("losparse")(keep=0.4, low_rank=0.1, steps=12, batch_size=2, length=16)
    assert technique.unfit(system) is None
    system = kept(technique.apply(system, text()), tmp_path)
    layers = {name: system.model.get_submodule(name) for name in shapes}
    factors = sum(layer.options["rank"] * sum(shapes[name]) for name, layer in layers.items())
    rows = sum(layer.options.get("kept", 0) * shapes[name][1] for name, layer in layers.items())
    marks = sum(shapes[name][0] for name, layer in layers.items() if "kept" in layer.options)
    assert stored_bytes(system) == pytest.approx(fixed + 2 * (factors + rows) + marks / 8, rel=1e-3)
    total = sum(shape.numel() for shape in shapes.values())
    assert 0.39 * total < factors + rows <= 0.4 * total


def test_all_three_matrices_of_losparse_are_quantized_by_a_later_technique() -> None:
    technique = get("losparse")(keep=0.4, low_rank=0.1, steps=2, batch_size=2, length=16)
    system = technique.apply(random_system("llama"), text())
    rows = sum(isinstance(module, LowRankRowsLinear) for module in system.model.modules())
    get("rtn")(bits=8).apply(system, text())
    assert sum(isinstance(module, PackedLinear) for module in system.model.modules()) == 28 + rows
    assert torch.isfinite(logits(system)).all()


def test_rank_that_leaves_nothing_for_rows_is_unfit_with_a_sentence() -> None:
    reason = get("losparse")(keep=0.02, low_rank=0.02).unfit(random_system("llama"))
    assert reason is not None and "keep=0.02 of its parameters is less than one rank of each matrix" in reason
    with pytest.raises(ValueError, match="low_rank must be at most keep"):
        get("losparse")(keep=0.1, low_rank=0.2)
