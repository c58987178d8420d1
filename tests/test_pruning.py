"""Pruning: the published errors on the golden layer, and zeros where and as many as promised."""

import pytest
import torch
from conftest import applied, logits, random_system
from golden_layer import agrees, golden_linear, output_error
from torch import nn

from effbench.measure.memory import stored_bytes
from effbench.registry import get
from effbench.toolbox.walk import matrices


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"sparsity": 0.3}, "9.7891e-03"),
        ({"sparsity": 0.5}, "6.5389e-02"),
        ({"sparsity": 0.7}, "1.68066e-01"),
        ({"pattern": "2:4"}, "8.9765e-02"),
    ],
    ids=str,
)
def test_magnitude_meets_the_errors_of_the_released_code(options: dict, golden: str) -> None:
    assert agrees(output_error(get("magnitude")(**options).layer(golden_linear(), None)), golden)


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.25, 1025), (0.5, 2049), (1.0, 4096)])
def test_as_many_weights_are_zeroed_as_the_released_code_zeroes(sparsity: float, zeros: int) -> None:
    linear = nn.Linear(64, 64)
    dense = linear.weight.detach().clone()
    weight = get("magnitude")(sparsity=sparsity).layer(linear, None).weight
    assert int((weight == 0).sum()) == zeros
    if 0 < zeros < 4096:
        assert dense[weight == 0].abs().max() <= dense[weight != 0].abs().min()
    assert torch.equal(weight[weight != 0], dense[weight != 0])


def test_ties_do_not_add_zeros() -> None:
    linear = nn.Linear(64, 64)
    linear.weight.data = torch.ones(64, 64)
    assert int((get("magnitude")(sparsity=0.5).layer(linear, None).weight == 0).sum()) == 2049


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_pattern_holds_in_each_run_of_inputs_of_each_row(pattern: str) -> None:
    zeros, run = (int(part) for part in pattern.split(":"))
    linear = nn.Linear(64, 48)
    dense = linear.weight.detach().clone().unflatten(1, (-1, run)).abs()
    weight = get("magnitude")(pattern=pattern).layer(linear, None).weight.unflatten(1, (-1, run))
    assert ((weight == 0).sum(-1) == zeros).all()
    gone = weight == 0
    assert (dense.masked_fill(~gone, 0).amax(-1) <= dense.masked_fill(gone, torch.inf).amin(-1)).all()


def test_half_of_every_architecture_is_zero_and_nothing_got_smaller(architecture: str) -> None:
    system = random_system(architecture)
    dense = stored_bytes(system)
    system = applied(system, "magnitude")
    for _, linear in matrices(system.model):
        assert int((linear.weight == 0).sum()) >= linear.weight.numel() // 2 + 1
    assert stored_bytes(system) == dense
    assert torch.isfinite(logits(system)).all()


def test_inputs_that_do_not_divide_into_runs_are_unfit_with_a_sentence() -> None:
    assert get("magnitude")(pattern="4:8").unfit_layer(nn.Linear(12, 8)) == "its 12 inputs do not divide into runs of 8"
