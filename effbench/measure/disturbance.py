"""What else the machine does while something is timed: other work on its processors, load, clocks, heat, throttling."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MOST = 0.15
"""A round is disturbed where others use more than this share of the processors."""
TICK_SECONDS = 0.03
"""What the system's clock of processor time may be off by in a round."""
THROTTLED = "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"


@dataclass(frozen=True)
class Moment:
    """One reading: the clock, processor seconds of this process and of all, and what was forced on this process."""

    clock: float
    own_seconds: float
    busy_seconds: float
    switches: int

    @classmethod
    def now(cls) -> Moment:
        """Read it; some 50 µs."""
        spent = psutil.cpu_times()
        idle = spent.idle + getattr(spent, "iowait", 0.0)
        busy = sum(spent) - idle - getattr(spent, "guest", 0.0) - getattr(spent, "guest_nice", 0.0)
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        return cls(time.perf_counter(), time.process_time(), busy, switches)


def others_share(before: Moment, after: Moment, partner_seconds: float = 0.0) -> float:
    """The share of all processors that neither this process nor its partner used between two moments.

    Work of other processes, of the kernel for them, and what a host took away from a virtual machine.
    """
    own = after.own_seconds - before.own_seconds + partner_seconds
    room = (after.clock - before.clock) * (psutil.cpu_count() or 1)
    other = after.busy_seconds - before.busy_seconds - own
    return max(0.0, other - TICK_SECONDS) / room if room > 0 else 0.0


def conditions() -> dict[str, Any]:
    """Load, clock, temperature and throttle count as far as the machine tells; `None` where it does not."""
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    heat = [entry.current for entries in sensors.values() for entry in entries]
    counts = [int(path.read_text()) for path in Path("/").glob(THROTTLED[1:])]
    return {
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clock_mhz": round(frequency.current) if frequency else None,
        "temperature_celsius": max(heat) if heat else None,
        "throttle_count": sum(counts) if counts else None,
        **_gpu(),
    }


def _gpu() -> dict[str, Any]:
    """The same of the GPU, where there is one and its library is installed."""
    try:
        import pynvml
        import torch

        if not torch.cuda.is_initialized():
            return {}
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        return {
            "gpu_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "gpu_temperature_celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "gpu_throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
    except Exception:  # none of it decides anything: a driver that does not tell is no reason to lose a timing
        return {}


UNKNOWN = {
    "load": "this system has no load average",
    "clock_mhz": "the processor's clock is not told here",
    "temperature_celsius": "there is no sensor here, as in most virtual machines",
    "throttle_count": "throttling is not counted here, as in most virtual machines",
}
"""Why a condition is `None`."""
