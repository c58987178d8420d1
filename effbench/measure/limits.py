"""The limits of this machine, measured: how fast it copies memory and multiplies matrices. They are kept.

A limit is the best of several tries: what the machine can do, where other figures are of what a model gets. Memory is
copied in blocks of several sizes, since a small model lives in a processor's caches and a large one does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.measure.host import machine, usable_cores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = {"cpu": (2**20, 2**24, 2**28), "cuda": (2**24, 2**28, 2**30)}
"""Bytes read and as many written by a copy that is timed."""
SIDES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square matrices that are multiplied."""
DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float32", "bfloat16", "float16", "int8")}
TRIES = 15


@dataclass
class Work:
    """Bytes to be read, and operations (multiplications and additions) by the dtype of the factors."""

    bytes: float = 0.0
    operations: dict[str, float] = field(default_factory=dict)

    def per(self, count: int, less: Work) -> Work:
        """What is left without `less`, divided by `count`."""
        rest = {name: max(0.0, value - less.operations.get(name, 0.0)) for name, value in self.operations.items()}
        operations = {name: value / count for name, value in rest.items() if value}
        return Work(max(0.0, self.bytes - less.bytes) / count, operations)


@dataclass(frozen=True)
class Limits:
    """What some threads of a device can do.

    copy_bytes_per_second: read and written, by the bytes of a block. operations_per_second: multiplications and
    additions of a matrix product, by dtype.
    """

    device: str
    threads: int
    copy_bytes_per_second: dict[int, float]
    operations_per_second: dict[str, float]
    measured: str = ""
    load: float | None = None
    """Processes that wanted to run when they were measured; more than this one make them too low."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> Limits:
        """From what JSON has made of it."""
        copies = {int(size): value for size, value in content["copy_bytes_per_second"].items()}
        return cls(**{**content, "copy_bytes_per_second": copies})

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second for so many bytes: as for the largest block whose copy touches no more, else the smallest."""
        fitting = [size for size in sorted(self.copy_bytes_per_second) if 2 * size <= working_set]
        return self.copy_bytes_per_second[fitting[-1] if fitting else min(self.copy_bytes_per_second)]

    def least_seconds(self, work: Work) -> float:
        """The roofline (Williams et al. 2009): the longer of moving the bytes and of doing the operations.

        A dtype whose products were not measured counts as float32.
        """
        rates = self.operations_per_second
        computing = sum(count / rates.get(dtype, rates["float32"]) for dtype, count in work.operations.items())
        return max(work.bytes / self.bandwidth(work.bytes), computing)


def measure(device: str) -> list[Limits]:
    """The limits of a device: of one thread and of all on a CPU. Takes seconds."""
    import torch

    found, before = [], torch.get_num_threads()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    for threads in sorted({1, usable_cores()}) if device == "cpu" else [1]:
        torch.set_num_threads(threads)
        try:
            copies = {size: _copied(size, device) for size in BLOCKS[device]}
            products = {name: rate for name in DTYPES[device] if (rate := _multiplied(name, device))}
        finally:
            torch.set_num_threads(before)
        found.append(Limits(device, threads, copies, products, date.today().isoformat(), load))
    return found


def _copied(size: int, device: str) -> float:
    import torch

    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _multiplied(name: str, device: str) -> float | None:
    """Operations a second; `None` where torch has no such product here."""
    import torch

    # of random numbers: a GPU multiplies ones and zeros at a higher clock
    numbers = (40 * torch.randn(SIDES[device], SIDES[device], device=device)).to(getattr(torch, name))

    def product() -> Tensor:
        return torch._int_mm(numbers, numbers) if name == "int8" else numbers @ numbers

    try:
        return 2 * len(numbers) ** 3 / _best(product, device)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def _best(work: Callable[[], object], device: str) -> float:
    """The shortest of `TRIES` times after a first one, in seconds."""
    import torch

    work()
    times = []
    for _ in range(TRIES):
        _wait(torch.device(device))
        start = time.perf_counter()
        work()
        _wait(torch.device(device))
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def path_of(device: str) -> Path:
    """Where the limits of this machine's device are kept: in the user's cache, one file for each machine and torch."""
    import torch

    known = {name: value for name, value in machine().items() if name in ("cpu", "cores", "gpus", "system")}
    which = json.dumps([known, platform.node(), torch.__version__, device], sort_keys=True)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "effbench" / f"limits-{device}-{hashlib.sha256(which.encode()).hexdigest()[:12]}.json"


def save(limits: list[Limits], path: Path) -> None:
    """Keep them.

    Raises `RecordError` where the file cannot be written.
    """
    from effbench.results import write_atomically

    write_atomically(path, json.dumps([asdict(limit) for limit in limits], indent=1) + "\n")


def load(path: Path) -> list[Limits]:
    """What `save` wrote; empty where nothing was measured, or by another effbench."""
    try:
        return [Limits.of(content) for content in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def known(device: str, threads: int) -> Limits | None:
    """The kept limits of so many threads of this machine; a GPU's do not depend on them."""
    fitting = [limit for limit in load(path_of(device)) if device != "cpu" or limit.threads == threads]
    return fitting[0] if fitting else None
