"""Bytes held, at their peak and on disk."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_system

from effbench import harness, results
from effbench.measure import memory
from effbench.suite import Suite


def test_what_is_held_is_the_weights_the_parts_and_a_full_cache(tmp_path: Path) -> None:
    suite = Suite(
        model="ref-70k",
        techniques=("draft:model=ref-70k",),
        tasks=("ref_copying",),
        limit=2,
        rounds=1,
        prompt_tokens=16,
        new_tokens=8,
        device="cpu",
        threads=1,
    )
    dense, drafted = results.load_all(harness.run(suite, tmp_path / "out"))[0]
    stored, cache = dense.values["stored_bytes"], dense.values["cache_bytes"]
    assert stored is not None and cache is not None
    assert dense.values["parts_bytes"] == 0 and drafted.values["parts_bytes"] == stored
    assert dense.values["held_bytes"] == stored + cache
    assert cache == dense.values["cache_bytes_per_token"] * 24  # type: ignore[operator]
    assert drafted.values["held_bytes"] == 2 * (stored + cache)
    assert stored < dense.values["saved_bytes"] < drafted.values["saved_bytes"]  # type: ignore[operator]
    for name in ("peak_device_bytes", "peak_device_reserved_bytes", "device_process_bytes"):
        assert dense.values[name] is None and dense.missing[name] == "no GPU was used"


def test_a_part_that_shares_with_the_model_is_charged_once() -> None:
    system = random_system("llama")
    system.parts["draft"] = system.model.model.layers[0]
    assert memory.parts_bytes(system) == 0
    system.parts["draft"] = copy.deepcopy(system.model.model.layers[0])
    own = sum(tensor.nbytes for tensor in system.parts["draft"].parameters())
    assert memory.parts_bytes(system) == own > 0


def test_a_folder_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "one").write_bytes(bytes(10))
    (tmp_path / "below" / "two").write_bytes(bytes(32))
    assert memory.folder_bytes(tmp_path) == 42


def test_a_gpus_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    processes = [SimpleNamespace(pid=1, usedGpuMemory=5), SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)]
    fake = SimpleNamespace(
        NVMLError=ValueError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    assert memory.device_process_bytes(torch.device("cuda")) == 7
    assert memory.device_process_bytes(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert memory.device_process_bytes(torch.device("cuda")) is None
