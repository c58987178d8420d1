"""Bytes: of what is stored, of what lives, of a filled cache, of the process."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from effbench.errors import UnfitError
from effbench.technique import System


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of each storage that the tensors stand on; a slice is charged with its whole base."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for plain in _flatten(tensor):
            if plain.device.type == "meta":
                continue
            storage = plain.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _flatten(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass or a sparse tensor is made of."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _flatten(getattr(tensor, name))
    else:
        yield tensor


def stored_tensors(system: System) -> Iterator[Tensor]:
    """All parameters and buffers of the model and of the parts that ship with it.

    Raises `UnfitError` for a module that keeps an opaque packed object, whose bytes cannot be seen.
    """
    for root in (system.model, *system.parts.values()):
        for name, module in root.named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, torch.ScriptObject):
                    raise UnfitError(f"{name}.{attribute} is an opaque packed object, whose bytes cannot be counted")
        yield from root.parameters()
        yield from root.buffers()


def stored_bytes(system: System) -> int:
    """Unique storages of parameters and buffers: scales, zeros, indices, drafts; tied weights once."""
    return sum(storages(stored_tensors(system)).values())


def parts_bytes(system: System) -> int:
    """What the parts beside the model store, such as a draft, and do not share with it."""
    own = storages([*system.model.parameters(), *system.model.buffers()]).keys()
    found = storages(tensor for part in system.parts.values() for tensor in (*part.parameters(), *part.buffers()))
    return sum(count for address, count in found.items() if address not in own)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder, and of those below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


HIDDEN_SHARE, HIDDEN_BYTES = 0.001, 65536
"""Live tensor bytes beside the stored ones that are not held against a technique: odds and ends of libraries."""


def others(system: System) -> list[Tensor]:
    """All live tensors that are not this system's."""
    own = storages(stored_tensors(system)).keys()
    return [tensor for tensor in live_tensors() if not (storages([tensor]).keys() & own)]


def hides(hidden: int, stored: int) -> bool:
    """Whether so many live bytes outside of so many stored ones are held against a technique."""
    return hidden > max(HIDDEN_BYTES, HIDDEN_SHARE * stored)


def hidden_bytes(system: System, known: Iterable[Tensor] = ()) -> int:
    """Bytes of live tensors that are neither stored by the system nor `known` to belong to somebody else.

    Weights that a technique keeps in a list, a closure or a global are found here.
    """
    stored = storages(stored_tensors(system)) | storages(known)
    alive = storages(live_tensors())
    return sum(count for address, count in alive.items() if address not in stored)


def live_tensors() -> list[Tensor]:
    """All tensors that are alive now. Types are looked at, not `isinstance`: that runs code of lazy objects."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor)]


def cache_bytes(cache: Cache) -> int:
    """Bytes of the storages held by a cache, wherever its layers keep them."""
    return sum(storages(_reachable(cache, set())).values())


def cache_shown_bytes(cache: Cache) -> int:
    """Bytes of the elements of a cache's tensors, without what their storages hold beyond them."""
    return sum({t.data_ptr(): t.nbytes for tensor in _reachable(cache, set()) for t in _flatten(tensor)}.values())


def _reachable(item: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from _reachable(value, seen)
    elif isinstance(item, list | tuple | set):
        for value in item:
            yield from _reachable(value, seen)
    elif hasattr(item, "__dict__") and not isinstance(item, nn.Module | type):
        yield from _reachable(vars(item), seen)


def module_bytes(module: nn.Module) -> int:
    """Bytes of what a matrix's module stores, its bias left out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return sum(storages(t for name, t in tensors if name.rpartition(".")[2] != "bias").values())


def resident_bytes() -> int:
    """The process's resident memory now; 0 where the system does not tell."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Start the process's peak anew, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The process's peak resident memory since `reset_peak`, or since its start."""
    peak = _status("VmHWM")
    if peak:
        return peak
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_device_bytes(device: torch.device) -> int | None:
    """The peak of the GPU's allocator since `reset_peak`; `None` without a GPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def peak_device_reserved_bytes(device: torch.device) -> int | None:
    """The peak of what the GPU's allocator has reserved since `reset_peak`, in use or not; `None` without a GPU."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None


def device_process_bytes(device: torch.device) -> int | None:
    """What this process takes of a GPU now, its context and libraries too; `None` where the driver does not tell."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except (pynvml.NVMLError, AttributeError, RuntimeError):
        return None
    return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)


def _status(key: str) -> int:
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)
