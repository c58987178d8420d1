"""Pruning: the published errors on the golden layer and on others, and zeros where and as many as promised."""

from typing import Any

import pytest
import torch
from calibrated_layers import calibrated_layer, relative_error
from conftest import applied, calibrated, logits, random_system
from golden_layer import agrees, golden_inputs, golden_linear, output_error
from torch import nn

from effbench import models
from effbench.data import Data, WorldSource
from effbench.errors import UnfitError
from effbench.measure.memory import stored_bytes
from effbench.measure.quality import score
from effbench.measure.statistics import paired_difference
from effbench.registry import get, parse
from effbench.toolbox.sparse import lowest
from effbench.toolbox.walk import matrices

CRITERIA = ("magnitude", "random", "sparsegpt", "wanda")


@pytest.mark.parametrize(
    ("name", "options", "golden"),
    [
        ("magnitude", {"sparsity": 0.3}, "9.7891e-03"),
        ("magnitude", {"sparsity": 0.5}, "6.5389e-02"),
        ("magnitude", {"sparsity": 0.7}, "1.68066e-01"),
        ("magnitude", {"pattern": "2:4"}, "8.9765e-02"),
        ("wanda", {"sparsity": 0.3}, "4.1751e-04"),
        ("wanda", {"sparsity": 0.5}, "2.5598e-03"),
        ("wanda", {"sparsity": 0.7}, "1.03011e-02"),
        ("wanda", {"pattern": "2:4"}, "7.4843e-03"),
        ("wanda", {"pattern": "4:8"}, "5.0887e-03"),
        ("sparsegpt", {"sparsity": 0.3}, "3.3753e-04"),
        ("sparsegpt", {"sparsity": 0.5}, "1.9703e-03"),
        ("sparsegpt", {"sparsity": 0.7}, "8.3679e-03"),
        ("sparsegpt", {"pattern": "2:4"}, "5.0574e-03"),
        ("sparsegpt", {"pattern": "4:8"}, "3.4345e-03"),
    ],
    ids=str,
)
def test_the_errors_are_those_of_the_released_code(name: str, options: dict, golden: str) -> None:
    layer = get(name)(**options).layer(golden_linear(), golden_inputs())
    assert agrees(output_error(layer), golden, 1e-3 if name == "sparsegpt" else 1e-5)


# From running the released code on these layers: `SparseGPT.fasterprune` (IST-DASLab/sparsegpt 147d215), the scores of
# `WrappedGPT` with the selection of `prune_wanda`, and that of `prune_magnitude` (locuslab/wanda 8e8fc87).
@pytest.mark.parametrize(
    ("name", "options", "errors", "zeros"),
    [
        ("magnitude", {"sparsity": 0.6}, ("1.022896e-01", "1.288139e-01", "1.205196e-01"), (2765, 29492, 12289)),
        ("magnitude", {"pattern": "4:8"}, ("7.253486e-02", "9.613218e-02", "1.030549e-01"), (2304, 24576, 10240)),
        ("wanda", {"sparsity": 0.6}, ("9.479999e-03", "5.275893e-03", "8.044286e-03"), (2736, 29440, 12288)),
        ("wanda", {"pattern": "2:4"}, ("1.020175e-02", "5.028424e-02", "4.467773e-02"), (2304, 24576, 10240)),
        ("wanda", {"pattern": "4:8"}, ("8.201295e-03", "2.625519e-02", "3.060363e-02"), (2304, 24576, 10240)),
        ("sparsegpt", {"sparsity": 0.6}, ("8.297094e-03", "4.139603e-03", "3.506925e-03"), (2765, 29493, 12290)),
        ("sparsegpt", {"block_size": 32}, ("3.358998e-03", "2.005657e-03", "1.455349e-03"), (2307, 24588, 10250)),
        ("sparsegpt", {"pattern": "2:4"}, ("6.822977e-03", "2.054804e-02", "6.366763e-03"), (2304, 24576, 10240)),
        ("sparsegpt", {"pattern": "4:8"}, ("5.281721e-03", "1.060421e-02", "3.953356e-03"), (2304, 24576, 10240)),
    ],
    ids=str,
)
def test_other_layers_end_as_in_the_released_code(name: str, options: dict, errors: tuple, zeros: tuple) -> None:
    for seed, error, count in zip((1, 2, 3), errors, zeros, strict=True):
        linear, inputs = calibrated_layer(seed)
        weight = linear.weight.detach().clone()
        found = get(name)(**options).layer(linear, inputs).weight
        assert int((found == 0).sum()) == count
        assert agrees(relative_error(weight, found, inputs), error, 1e-5)


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.25, 1025), (0.5, 2049), (0.9999, 4096)])
def test_over_a_matrix_as_many_are_zeroed_as_the_released_code_zeroes(sparsity: float, zeros: int) -> None:
    linear = nn.Linear(64, 64)
    dense = linear.weight.detach().clone()
    weight = get("magnitude")(sparsity=sparsity).layer(linear, None).weight
    assert int((weight == 0).sum()) == zeros
    if zeros < 4096:
        assert dense[weight == 0].abs().max() <= dense[weight != 0].abs().min()
    assert torch.equal(weight[weight != 0], dense[weight != 0])


@pytest.mark.parametrize("name", CRITERIA)
def test_compared_within_rows_every_row_has_the_same_zeros(name: str) -> None:
    linear = nn.Linear(50, 24)
    weight = get(name)(sparsity=0.37, compare="row").layer(linear, torch.randn(200, 50)).weight
    assert ((weight == 0).sum(1) == int(50 * 0.37)).all()


def test_wanda_compares_within_rows_unless_told_otherwise() -> None:
    layers = [get("wanda")(**more).layer(golden_linear(), golden_inputs()) for more in ({}, {"compare": "matrix"})]
    by_row, by_matrix = ((layer.weight == 0).sum(1) for layer in layers)
    assert (by_row == 128).all()
    assert int(by_matrix.sum()) == 64 * 128 + 1 and len(set(by_matrix.tolist())) > 1


def test_ties_do_not_add_zeros() -> None:
    assert int(lowest(torch.ones(64, 64), 0.5).sum()) == 2049
    assert (lowest(torch.ones(64, 64), 0.5, compare="row").sum(1) == 32).all()
    assert (lowest(torch.ones(64, 64), 0.5, "2:4").unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_pattern_holds_in_each_run_of_inputs_of_each_row(name: str, pattern: str) -> None:
    zeros, run = (int(part) for part in pattern.split(":"))
    linear = nn.Linear(136, 48)  # the last block of columns is a short one
    weight = get(name)(pattern=pattern).layer(linear, torch.randn(300, 136)).weight.unflatten(1, (-1, run))
    assert ((weight == 0).sum(-1) == zeros).all()


def test_with_inputs_alike_wanda_is_magnitude() -> None:
    inputs = torch.randn(64, 40).sign()
    for options in ({"sparsity": 0.4, "compare": "row"}, {"sparsity": 0.4, "compare": "matrix"}, {"pattern": "2:4"}):
        linears = [nn.Linear(40, 16), nn.Linear(40, 16)]
        linears[1].load_state_dict(linears[0].state_dict())
        wanda, magnitude = (get(name)(**options).layer(linears.pop(), inputs) for name in ("wanda", "magnitude"))
        assert torch.equal(wanda.weight, magnitude.weight)


def test_with_independent_inputs_sparsegpt_changes_no_weight_that_stays() -> None:
    inputs = torch.linalg.qr(torch.randn(64, 40))[0] * torch.rand(40).add(0.5)
    linear = nn.Linear(40, 16)
    dense = linear.weight.detach().clone()
    weight = get("sparsegpt")(compare="row").layer(linear, inputs).weight
    kept = weight != 0
    torch.testing.assert_close(weight[kept], dense[kept], rtol=1e-4, atol=1e-5)
    assert ((~kept).sum(1) == 20).all()


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_left_makes_up_for_what_went(seed: int) -> None:
    """The same mask alone is worse; least squares over all that stays, not just over later inputs, is better."""
    linear, inputs = calibrated_layer(seed)
    used = inputs.abs().sum(0) > 0
    dense, inputs = linear.weight.detach()[:, used].clone(), inputs[:, used]
    linear.weight.data = dense
    weight = get("sparsegpt")(compare="row").layer(linear, inputs).weight.detach()
    best = torch.zeros_like(dense, dtype=torch.float64)
    gram = inputs.double().T @ inputs.double()
    for row, kept in enumerate(weight != 0):
        best[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ dense[row].double())
    errors = [relative_error(dense, matrix, inputs) for matrix in (best, weight, dense * (weight != 0))]
    assert errors[0] < errors[1] < errors[2]


def test_random_zeros_are_of_the_seed_and_other_in_each_matrix() -> None:
    masks = [
        [linear.weight == 0 for _, linear in matrices(applied(random_system("llama"), f"random:seed={seed}").model)]
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(one, other) for one, other in zip(masks[0], masks[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(masks[0], masks[2], strict=True))
    assert not torch.equal(masks[0][0], masks[0][7])  # the same matrix of the next block


@pytest.mark.parametrize("name", CRITERIA)
def test_half_of_every_architecture_is_zero_and_nothing_got_smaller(architecture: str, name: str) -> None:
    system = random_system(architecture)
    dense = stored_bytes(system)
    system = calibrated(system, name)
    for _, linear in matrices(system.model):
        share = float((linear.weight == 0).double().mean())
        assert 0.5 <= share < 0.502
    assert stored_bytes(system) == dense
    assert torch.isfinite(logits(system)).all()


@pytest.fixture(scope="module")
def nats() -> dict[str, tuple[list[float], list[int]]]:
    """Nats of each held-out window of ref-1m, and its tokens, after each pipeline."""
    found = {}
    for pattern in ("", ":pattern=2:4"):
        for name in CRITERIA:
            system = models.load("ref-1m", "bfloat16")
            source = WorldSource(system.tokenizer)
            data = Data(source, system.context, lambda other: pytest.fail(f"asked for {other}"))
            for technique in parse(name + pattern):
                system = technique.apply(system, data)
            scored = score(system, source.evaluation(system.context, 24))
            found[name + pattern] = scored.nats, scored.tokens
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("sparsegpt", "wanda"),
        ("sparsegpt", "magnitude"),
        ("magnitude", "random"),
        ("sparsegpt:pattern=2:4", "wanda:pattern=2:4"),
        ("sparsegpt", "sparsegpt:pattern=2:4"),
        ("wanda", "wanda:pattern=2:4"),
        ("magnitude", "magnitude:pattern=2:4"),
    ],
)
def test_the_known_orders_hold_on_a_trained_model(nats: dict[str, Any], better: str, worse: str) -> None:
    (low, tokens), (high, _) = nats[better], nats[worse]
    difference, error = paired_difference(high, low, tokens)
    assert difference > 4 * error


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("wanda", {"sparsity": 0.0}, "sparsity must be strictly between 0 and 1, got 0.0"),
        ("sparsegpt", {"sparsity": 1}, "sparsity must be strictly between 0 and 1, got 1"),
        ("random", {"sparsity": float("nan")}, "sparsity must be strictly between 0 and 1, got nan"),
        ("magnitude", {"pattern": "1:4"}, "pattern must be one of unstructured, 2:4, 4:8, got 1:4"),
        ("wanda", {"pattern": "2:4", "sparsity": 0.7}, "sparsity is 0.5 with pattern=2:4, leave it out; got 0.7"),
        ("magnitude", {"compare": "column"}, "compare must be one of matrix, row, got column"),
        ("wanda", {"store": "coo"}, "store must be one of dense, bitmask, 2:4, csr, got coo"),
        ("wanda", {"store": "2:4"}, "store=2:4 needs pattern=2:4, got unstructured"),
        ("sparsegpt", {"pattern": "4:8", "block_size": 12}, "block_size must hold whole runs of pattern=4:8, got 12"),
        ("sparsegpt", {"damping": -1.0}, "damping must be at least 0, got -1.0"),
        ("wanda", {"samples": 0}, "samples must be at least 1, got 0"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_with_a_sentence(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError) as error:
        get(name)(**options)
    assert said in str(error.value)


@pytest.mark.parametrize("name", CRITERIA)
def test_inputs_that_do_not_divide_into_runs_are_unfit_with_a_sentence(name: str) -> None:
    assert get(name)(pattern="4:8").unfit_layer(nn.Linear(12, 8)) == "its 12 inputs do not divide into runs of 8"


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_calibration_that_is_not_a_number_names_the_layer(name: str) -> None:
    system = random_system("llama")
    system.model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(UnfitError, match=r"^model\.layers\.1\.self_attn\.\w_proj: .*not all finite"):
        calibrated(system, name)


def test_directions_that_no_input_takes_need_damping() -> None:
    with pytest.raises(UnfitError, match="do not span enough directions for damping 0; use more samples"):
        get("sparsegpt")(damping=0.0).layer(nn.Linear(40, 8), torch.ones(30, 40))
