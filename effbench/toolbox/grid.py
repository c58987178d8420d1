"""Uniform grids: 2^bits levels, evenly spaced, for a row of weights or a group of them.

A weight w has the code clamp(round(w / scale) + zero, 0, 2^bits - 1) and stands for scale * (code - zero).
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-7
"""Weights below it are as good as zero; a float16 can still hold it."""
SHRINKS = [1 - step / 100 for step in range(80)]
"""The shares of the full range among which the search for less error chooses."""
ERROR_POWER = 2.4
"""The power of the absolute error that the search sums up."""


def fit_grid(
    groups: Tensor, bits: int, *, symmetric: bool = False, mse: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (...) in float32 of the grids for groups of weights (..., width).

    A grid spans the smallest and the largest weight and zero; a symmetric one spans both sides alike, with its
    zero point in the middle. With `mse`, each group takes the share of that range with the least weight error.
    Scales are rounded to `dtype`, in which they will be stored, before zero points are found, so that codes make
    up for it. Source: the quantizer of GPTQ's released code (Frantar et al. 2023, arXiv:2210.17323).
    """
    groups = groups.float()
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    flat = low == high
    low, high = low.masked_fill(flat, -1.0), high.masked_fill(flat, 1.0)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(low, float("inf"))
    for share in SHRINKS if mse else [1.0]:
        scales = (high * share - low * share) / (2**bits - 1)
        scales = scales.clamp(min=SMALLEST_SCALE).to(dtype).float()
        zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low * share / scales).round()
        zeros = zeros.clamp(0, 2**bits - 1)
        if best is None:
            best = scales, zeros
        if mse:
            values = decode(encode(groups, scales, zeros, bits), scales, zeros)
            error = (values - groups).abs().pow(ERROR_POWER).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
    assert best is not None
    return best


def encode(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The codes (..., width) of type uint8 of groups of weights (..., width) on grids (...)."""
    codes = (groups.float() / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What codes (..., width) on grids (...) stand for, in float32."""
    return codes.float().sub_(zeros.float().unsqueeze(-1)).mul_(scales.float().unsqueeze(-1))
