"""Seconds to the first token and for each one after, through the one door `system.generate`."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from effbench.technique import Generation, System


def _clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def one_round(system: System, prompt: Tensor, new_tokens: int) -> tuple[float, float, Generation]:
    """Seconds to the first new token, seconds for each further one, and what was generated.

    `prompt` is (batch, tokens). The second is (time of all `new_tokens` - time of the first) / (new_tokens - 1),
    both by their own call, so whatever a decoding policy does before its first token counts as prefill.
    """
    device = system.device
    start = _clock(device)
    system.generate(system, prompt, 1)
    first = _clock(device)
    generation = system.generate(system, prompt, new_tokens)
    end = _clock(device)
    prefill = first - start
    return prefill, max(end - first - prefill, 1e-9) / (new_tokens - 1), generation
