"""Energy of prefill and of decode, above what the device takes when nothing runs; absent where there is no counter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from effbench.measure.counters import Meter
from effbench.results import Record

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.technique import System

STEPS = 25
"""A window is at least so many steps of the counter long, each end of which is uncertain by one."""
LEAST_SECONDS = 0.5
WINDOWS = 3
"""How often each stage is measured."""
COLUMNS = (
    "joules_per_token",
    "joules_per_token_with_idle",
    "prefill_joules_per_token",
    "decode_joules_per_token",
    "idle_watts",
)


@dataclass(frozen=True)
class Spent:
    """One window: joules and seconds of one repetition of some work."""

    joules: float
    seconds: float


def least_seconds(meter: Meter) -> float:
    """How long a window has to be at least for this counter."""
    return max(LEAST_SECONDS, STEPS * meter.step())


def spent(meter: Meter, work: Callable[[], object]) -> Spent | None:
    """Joules and seconds of `work`, repeated in one window until that is long enough for the counter's steps.

    `None`, with the reason in `meter.why`, without a source or where the counter cannot say.
    """
    least, count = least_seconds(meter) if meter.source else 0.0, 0
    meter.start()
    began = meter.clock()
    while not count or meter.clock() - began < least:
        work()
        count += 1
    joules = meter.stop()
    return None if joules is None else Spent(joules / count, meter.seconds / count)


def idle_watts(meter: Meter) -> float | None:
    """The power that is taken while this process waits."""
    found = spent(meter, lambda: time.sleep(least_seconds(meter)))
    return None if found is None else found.joules / found.seconds


def above_idle(meter: Meter, work: Callable[[], object]) -> tuple[float | None, list[float]]:
    """Joules of doing `work` once, less those of waiting as long; and the idle watts before and after.

    It is done in any case. `None` as in `spent`, or where it was too short for the counter's steps.
    """
    if meter.source is None:
        work()
        meter.stop()
        return None, []
    before = idle_watts(meter)
    meter.start()
    work()
    joules, seconds, why = meter.stop(), meter.seconds, meter.why
    after = idle_watts(meter)
    if joules is None or before is None or after is None:
        meter.why = why or meter.why
        return None, []
    if seconds < least_seconds(meter):
        meter.why = f"it took {seconds:.2g} s, which is too short for a counter that moves every {meter.step():.2g} s"
        return None, [before, after]
    return joules - seconds * (before + after) / 2, [before, after]


def measure(record: Record, system: System, prompt: Tensor, new_tokens: int, meter: Meter) -> None:
    """Put the energy of generating into a row, stage by stage; `prompt` is (batch, tokens).

    Each window repeats a request until it is long enough. What the device takes when idle is measured before and
    after and taken off; the energy of decode is that of whole requests without that of their prefill.
    """
    record.provenance["energy"] = {"source": meter.source or "none"}
    why = meter.reason
    if meter.source:
        record.provenance["energy"]["step_seconds"] = meter.step()
        before = idle_watts(meter)
        asked = [1, new_tokens] * WINDOWS
        stages = [spent(meter, partial(_generate, system, prompt, count)) for count in asked]
        after = idle_watts(meter)
        if before is not None and after is not None and None not in stages:
            found = [stage for stage in stages if stage is not None]
            _put(record, found[::2], found[1::2], [before, after], prompt.shape, new_tokens)
            return
        why = meter.why or "a window could not be measured"
    for name in COLUMNS:
        record.put(name, None, why)


def _put(
    record: Record,
    prefills: list[Spent],
    wholes: list[Spent],
    idle: list[float],
    shape: tuple[int, ...],
    new_tokens: int,
) -> None:
    (batch, length), watts = shape, sum(idle) / 2
    prefill, whole = ([s.joules - watts * s.seconds for s in stage] for stage in (prefills, wholes))
    decode = [(all_of_it - first) / (new_tokens - 1) for first, all_of_it in zip(prefill, whole, strict=True)]
    figures = {
        "joules_per_token": [joules / (batch * new_tokens) for joules in whole],
        "joules_per_token_with_idle": [s.joules / (batch * new_tokens) for s in wholes],
        "prefill_joules_per_token": [joules / (batch * length) for joules in prefill],
        "decode_joules_per_token": [joules / batch for joules in decode],
    }
    for name, values in figures.items():
        mean = sum(values) / len(values)
        record.samples[name] = values
        lost = "it cannot be told from what the device takes when idle"
        record.put(name, mean if mean > 0 else None, lost)
    record.samples["idle_watts"] = idle
    record.put("idle_watts", watts)


def _generate(system: System, prompt: Tensor, new_tokens: int) -> None:
    system.generate(system, prompt, new_tokens)
    if system.device.type == "cuda":
        import torch

        torch.cuda.synchronize(system.device)
