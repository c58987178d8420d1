"""Where energy comes from: the counter that belongs to a device, or power integrated over time; never a model.

Each source says which it is: "counter (NVML)", "counter (RAPL)", "integrated power (NVML)" where a GPU has no counter,
"counter or integrated power (Zeus)" with the extra of that name where neither can be read. A meter without a source
says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 1000.0
"""No processor package takes more; a window in which so much could fill a counter twice is not believed."""
STEP_SECONDS = 2.0
"""How long it is watched how often a counter moves."""
POWER_SECONDS = 0.02
"""Between two readings of a power that is integrated."""


@dataclass
class Meter:
    """Joules of windows of time: of the whole package or board, other processes included.

    `source` names where they come from, `reason` says why there is none. `read` gives the joules of each counter so
    far, `wraps` the joules at which each begins at 0 again, 0 for one that does not.
    """

    source: str | None
    reason: str
    read: Callable[[], list[float]] = field(repr=False, default=list)
    wraps: list[float] = field(repr=False, default_factory=list)
    clock: Callable[[], float] = field(repr=False, default=time.perf_counter)
    why: str = ""
    """Why the last window has no joules."""
    seconds: float = 0.0
    """How long the last window was."""

    def __post_init__(self) -> None:
        self._step: float | None = None
        self._started: tuple[float, list[float]] = (0.0, [])

    def start(self) -> None:
        """Open a window."""
        self._started = (self.clock(), self.read())

    def stop(self) -> float | None:
        """Joules since `start`. `None`, with the reason in `why`, without a source or where the counter cannot say."""
        self.why = self.reason
        if self.source is None:
            return None
        began, first = self._started
        last = self.read()
        self.seconds = self.clock() - began
        total = 0.0
        for before, after, wrap in zip(first, last, self.wraps, strict=True):
            if wrap and self.seconds * MOST_WATTS > wrap:
                self.why = "the window is so long that the counter may have gone round more than once"
                return None
            if after < before and not wrap:
                self.why = "the counter went back to a smaller value"
                return None
            total += after - before if after >= before else after - before + wrap
        self.why = ""
        return total

    def step(self) -> float:
        """Seconds between two changes of the counter: the longest that was seen in `STEP_SECONDS`."""
        if self._step is None:
            changes: list[float] = []
            began = now = self.clock()
            last = self.read()
            while now - began < STEP_SECONDS and len(changes) < 20:
                value, now = self.read(), self.clock()
                if value != last:
                    changes.append(now)
                    last = value
            gaps = [after - before for before, after in zip(changes, changes[1:], strict=False)]
            self._step = max(gaps, default=STEP_SECONDS)
        return self._step


def meter(device: str) -> Meter:
    """The meter of a device: NVML for `cuda`, RAPL packages for `cpu`; Zeus where it can read what these cannot."""
    cuda = device.startswith("cuda")
    found = _nvml() if cuda else _rapl()
    refused = "refused" in found.reason
    return found if found.source or refused else _zeus(cuda) or found


def _rapl() -> Meter:
    packages = sorted(POWERCAP.glob("intel-rapl:[0-9]*")) if POWERCAP.is_dir() else []
    packages = [zone for zone in packages if zone.name.count(":") == 1]
    if not packages:
        return Meter(None, "no energy counter on this machine (no RAPL)")
    try:
        wraps = [int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in packages]
        read = lambda: [int((zone / "energy_uj").read_text()) / 1e6 for zone in packages]  # noqa: E731
        read()
    except OSError:
        return Meter(None, "the energy counter (RAPL) cannot be read by this user")
    return Meter("counter (RAPL)", "", read, wraps)


def _nvml() -> Meter:
    try:
        import pynvml
    except ImportError:
        return Meter(None, "the GPU's energy counter needs the package nvidia-ml-py (pip install 'effbench[gpu]')")
    try:
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        if uuid.startswith("MIG"):
            return Meter(None, "refused: this is a part of a GPU (MIG), and the counter is that of all its parts")
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        shared = _shared(pynvml, handle)
        if shared:
            return Meter(None, f"refused: {shared}")
        try:
            read = lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3]  # noqa: E731
            read()
        except pynvml.NVMLError:
            integrated = _Integrated(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
            return Meter("integrated power (NVML)", "", integrated.read, [0.0])
    except (pynvml.NVMLError, AssertionError, RuntimeError, AttributeError) as reason:
        return Meter(None, f"the GPU's energy counter cannot be read ({reason})")
    return Meter("counter (NVML)", "", read, [0.0])


def _shared(pynvml: Any, handle: Any) -> str:
    """Why the counter of a GPU is not that of this run alone; empty if it is."""
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return "the GPU is divided (MIG), and the counter is that of all its parts"
    except pynvml.NVMLError:
        pass  # too old a GPU to be divided
    import psutil

    this = psutil.Process()
    parent = this.parent()
    ours = {this.pid, *(child.pid for child in (parent.children(recursive=True) if parent else ()))}
    running = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    # a container sees other numbers than the driver: then this row's and the dense worker's are the two that may be
    others = running - ours if running & ours else set(sorted(running)[2:])
    who = "another process uses" if len(others) == 1 else f"{len(others)} other processes use"
    return f"{who} the GPU, and the counter is that of all" if others else ""


class _Integrated:
    """Joules so far, by the trapezoid rule over a power that a thread of its own reads again and again."""

    def __init__(self, watts: Callable[[], float]) -> None:
        self._watts, self._lock, self._joules = watts, threading.Lock(), 0.0
        self._last = (time.perf_counter(), watts())
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(POWER_SECONDS)
            self.read()

    def read(self) -> list[float]:
        with self._lock:
            now, watts = time.perf_counter(), self._watts()
            self._joules += (now - self._last[0]) * (watts + self._last[1]) / 2
            self._last = (now, watts)
            return [self._joules]


def _zeus(cuda: bool) -> Meter | None:
    """Joules by Zeus, where it is installed and has any for this device."""
    try:
        from zeus.monitor import ZeusMonitor

        monitor = ZeusMonitor(gpu_indices=[0], cpu_indices=[]) if cuda else ZeusMonitor(gpu_indices=[])
    except Exception:  # it raises errors of its own for every device that it does not know
        return None
    total = [0.0]

    def read() -> list[float]:
        found = monitor.end_window("effbench")
        joules = found.gpu_energy if cuda else found.cpu_energy
        total[0] += sum((joules or {}).values())
        monitor.begin_window("effbench")
        return list(total)

    monitor.begin_window("effbench")
    if not (monitor.gpu_indices if cuda else monitor.cpu_indices):
        return None
    return Meter("counter or integrated power (Zeus)", "", read, [0.0])
