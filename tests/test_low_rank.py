"""Low rank: the published error on the golden layer, the best approximation, factors that stay factors."""

from pathlib import Path

import pytest
import torch
from conftest import applied, logits, random_system
from golden_layer import agrees, golden_linear, output_error
from torch import nn

from effbench import store
from effbench.measure.memory import stored_bytes
from effbench.registry import get
from effbench.toolbox.low_rank import LowRankLinear
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.walk import matrices


@pytest.mark.parametrize(("keep", "golden"), [(0.8, ".19573"), (0.6, ".40894"), (0.4, ".52922"), (0.2, ".67834")])
def test_svd_meets_the_errors_of_the_released_code(keep: float, golden: str) -> None:
    assert agrees(output_error(get("svd")(keep=keep).layer(golden_linear(), None)), golden)


def test_the_weight_error_is_that_of_the_singular_values_dropped() -> None:
    weight = golden_linear().weight
    layer = get("svd")(keep=0.6).layer(golden_linear(), None)
    left = (layer.second.weight @ layer.first.weight).detach()
    dropped = torch.linalg.svdvals(weight.double())[layer.options["rank"] :].square().sum()
    assert float((weight - left).double().square().sum()) == pytest.approx(float(dropped), rel=1e-5)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_no_more_is_kept_than_asked_for_and_not_a_rank_less(keep: float) -> None:
    linear = nn.Linear(96, 64, bias=False)
    layer = get("svd")(keep=keep).layer(linear, None)
    kept = sum(p.numel() for p in layer.parameters())
    assert keep * 96 * 64 - (96 + 64) < kept <= keep * 96 * 64


def test_every_architecture_gets_smaller(architecture: str) -> None:
    system = random_system(architecture)
    dense, held = stored_bytes(system), sum(linear.weight.numel() for _, linear in matrices(system.model))
    system = applied(system, "svd:keep=0.5")
    assert 0 <= (dense - stored_bytes(system)) - held < 0.1 * held  # half of two bytes a weight, and rank's remainder
    assert torch.isfinite(logits(system)).all()


def test_a_full_rank_would_change_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = logits(random_system(architecture, torch.float32))
    monkeypatch.setattr(f"{get('svd').__module__}.rank_for", lambda rows, columns, keep: min(rows, columns))
    whole = logits(applied(random_system(architecture, torch.float32), "svd"))
    torch.testing.assert_close(whole, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pipeline", ["svd:keep=0.5", "svd:keep=0.8+rtn:bits=4", "svd+svd+rtn:bits=8"])
def test_a_stack_is_saved_and_loaded_bit_for_bit(architecture: str, pipeline: str, tmp_path: Path) -> None:
    system = applied(random_system(architecture), pipeline)
    before, size = logits(system), stored_bytes(system)
    store.save(system, tmp_path / "taken_home", pipeline)
    again = store.load(tmp_path / "taken_home")
    assert torch.equal(logits(again), before)
    assert stored_bytes(again) == size


def test_factors_are_quantized_like_any_matrix() -> None:
    system = applied(random_system("llama"), "svd:keep=0.8+rtn:bits=4")
    factors = [m for m in system.model.modules() if isinstance(m, LowRankLinear)]
    assert len(factors) == 14
    assert all(isinstance(part, PackedLinear) for layer in factors for part in (layer.first, layer.second))
    assert matrices(system.model) == []


def test_less_than_one_rank_is_unfit_with_a_sentence() -> None:
    reason = get("svd")(keep=0.01).unfit(random_system("gpt2"))
    assert reason is not None and "keep=0.01 of its 192 x 64 parameters is less than one rank" in reason
