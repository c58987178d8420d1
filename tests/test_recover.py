"""Recovering: what is added starts as nothing, is merged exactly, and wins back what pruning lost."""

from typing import Any

import pytest
import torch
from conftest import calibrated, logits, random_system

from effbench import models
from effbench.data import Data, WorldSource
from effbench.measure.memory import stored_bytes
from effbench.measure.quality import score
from effbench.registry import get
from effbench.technique import System
from effbench.toolbox.walk import matrices

QUICK = "recover:steps=2,batch_size=2,length=32"


def test_additions_that_learn_nothing_change_nothing(architecture: str) -> None:
    before = logits(random_system(architecture))
    assert torch.equal(logits(calibrated(random_system(architecture), f"{QUICK},lr=1e-12")), before)


def test_only_matrices_change_and_by_no_more_than_the_rank(architecture: str) -> None:
    dense, system = random_system(architecture, torch.float32), random_system(architecture, torch.float32)
    stored = stored_bytes(system)
    names = [type(module) for module in system.model.modules()]
    system = calibrated(system, f"{QUICK},rank=3")
    assert stored_bytes(system) == stored and [type(module) for module in system.model.modules()] == names
    for (name, old), (_, new) in zip(matrices(dense.model), matrices(system.model), strict=True):
        values = torch.linalg.svdvals((new.weight - old.weight).detach())
        assert values[0] > 1e-4 and values[3] < 1e-3 * values[0], name
    changed = {name.rpartition(".")[0] for name, _ in matrices(dense.model)}
    for (name, old), new in zip(dense.model.named_parameters(), system.model.parameters(), strict=True):
        if old.ndim == 1 or not any(name.startswith(prefix) for prefix in changed):
            assert torch.equal(old, new), name
        assert new.grad is None


def test_what_was_trained_is_what_is_merged(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    system = random_system(architecture, torch.float32)
    module: Any = __import__("sys").modules[get("recover").__module__]
    seen, train = [], module.train

    def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
        train(model, *args, **kwargs)
        seen.append(logits(system))

    monkeypatch.setattr(module, "train", spy)
    before = logits(system)
    system = calibrated(system, f"{QUICK},lr=0.05")
    assert (seen[0] - before).abs().max() > 0.01
    torch.testing.assert_close(logits(system), seen[0], rtol=0, atol=1e-5)


def test_zeros_of_a_pruned_matrix_stay() -> None:
    system = calibrated(random_system("llama"), "magnitude:sparsity=0.5")
    zeros = [linear.weight == 0 for _, linear in matrices(system.model)]
    assert all(float(places.float().mean()) >= 0.5 for places in zeros)
    system = calibrated(system, f"{QUICK},lr=0.01")
    for (name, linear), places in zip(matrices(system.model), zeros, strict=True):
        assert not linear.weight[places].any(), name


def test_one_seed_is_one_result_and_another_another() -> None:
    found = [logits(calibrated(random_system("llama"), f"{QUICK},lr=0.05,seed={seed}")) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_packed_matrices_are_unfit() -> None:
    assert "put this technique before" in str(get("recover")().unfit(calibrated(random_system("llama"), "rtn")))


def nats(system: System) -> float:
    scored = score(system, WorldSource(system.tokenizer).evaluation(system.context, 24))
    return float(scored.nll_per_token)


def test_half_of_what_llm_pruner_lost_comes_back() -> None:
    dense = nats(models.load("ref-1m"))
    found = {}
    for recovered in (False, True):
        system = models.load("ref-1m")
        data = Data(WorldSource(system.tokenizer), system.context, load=lambda name: pytest.fail(name))
        system = get("llm_pruner")(sparsity=0.2).apply(system, data)
        if recovered:
            system = get("recover")(steps=60).apply(system, data)
        found[recovered] = nats(system)
    assert found[True] - dense < 0.5 * (found[False] - dense)
