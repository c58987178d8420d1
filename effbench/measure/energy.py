"""Energy as the difference of a hardware counter over a window; absent where there is no counter, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Meter:
    """Reads the energy counter that belongs to a device.

    `source` names it, `reason` says why there is none. Between `start` and `stop` nothing may be averaged out:
    the figure is of the whole package or board, other processes included.
    """

    source: str | None
    reason: str
    _read: Callable[[], list[float]] = field(repr=False, default=list)
    _wraps: list[float] = field(repr=False, default_factory=list)
    _started: list[float] = field(repr=False, default_factory=list)
    stopped: float | None = None
    """Joules of the last window; `None` without a counter."""

    def start(self) -> None:
        """Open the window."""
        self._started = self._read()

    def stop(self) -> float | None:
        """Joules since `start`; `None` without a counter."""
        if self.source is None:
            return None
        total = 0.0
        for before, after, wrap in zip(self._started, self._read(), self._wraps, strict=True):
            total += after - before if after >= before else after - before + wrap
        self.stopped = total
        return total


def meter(device: str) -> Meter:
    """The meter of a device: NVML's total energy for `cuda`, RAPL packages for `cpu`."""
    return _nvml() if device.startswith("cuda") else _rapl()


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
    return Meter("RAPL", "", read, wraps)


def _nvml() -> Meter:
    try:
        import pynvml
    except ImportError:
        return Meter(None, "the GPU's energy counter needs the package nvidia-ml-py (pip install 'effbench[gpu]')")
    try:
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        read = lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3]  # noqa: E731
        read()
    except (pynvml.NVMLError, AssertionError, RuntimeError, AttributeError) as reason:
        return Meter(None, f"the GPU's energy counter cannot be read ({reason})")
    return Meter("NVML", "", read, [0.0])
