"""Seconds to the first token and for each one after, through the one door `system.generate`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from effbench.technique import Generation, System


def _mark(device: torch.device) -> Any:
    """A moment: an event in the device's own queue on a GPU, the monotonic clock on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: Any, end: Any) -> float:
    """The time between two marks, once all before the second is done."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


IDEAL_TRIES = 3
"""How often a time without noise is tried for."""


def ideal(system: System, prompt: Tensor, new_tokens: int) -> tuple[dict[int, float], float]:
    """The shortest seconds to the first new token by length of the prompt, and the slope: seconds of each further one.

    `prompt` is (batch, tokens). The lengths are a quarter, a half and all of it; the slope is from the shortest times
    of one and of `new_tokens` tokens.
    """
    lengths = sorted({max(1, prompt.shape[1] // part) for part in (4, 2, 1)})
    table = {length: _shortest(system, prompt[:, :length], 1) for length in lengths}
    everything = _shortest(system, prompt, new_tokens)
    return table, max(0.0, everything - table[prompt.shape[1]]) / (new_tokens - 1)


def _shortest(system: System, prompt: Tensor, new_tokens: int) -> float:
    times = []
    for _ in range(IDEAL_TRIES):
        start = _mark(system.device)
        system.generate(system, prompt, new_tokens)
        times.append(_seconds(start, _mark(system.device)))
    return min(times)


def one_round(system: System, prompt: Tensor, new_tokens: int) -> tuple[float, float, Generation]:
    """Seconds to the first new token, seconds for each further one, and what was generated.

    `prompt` is (batch, tokens). The second is (time of all `new_tokens` - time of the first) / (new_tokens - 1),
    both by their own call, so whatever a decoding policy does before its first token counts as prefill. Where noise is
    larger than the new tokens' time it is not positive.
    """
    device = system.device
    start = _mark(device)
    system.generate(system, prompt, 1)
    first = _mark(device)
    generation = system.generate(system, prompt, new_tokens)
    end = _mark(device)
    prefill, everything = _seconds(start, first), _seconds(first, end)
    return prefill, (everything - prefill) / (new_tokens - 1), generation
