"""Codes of 1 to 8 bits in bytes, with no bit to spare.

A width that is no power of two is cut into parts that are (3 = 2 + 1), and the parts are stored one after the other.
Within a part of w bits and n bytes, byte i holds the codes i, i + n, i + 2n, ... from its lowest bits upward: taken
apart, each run of codes is written in one piece. Codes of 8 bits are stored less 128, as the signed bytes that the
int8 kernel reads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` codes take; each part is filled up to a whole byte."""
    return sum(-(-count * part // 8) for part in _parts(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` (any shape) of type uint8, all below 2^bits, as flat bytes."""
    codes = codes.flatten()
    if bits == 8:
        return codes ^ 128
    pieces, below = [], 0
    for part in _parts(bits):
        values = (codes >> below) & (2**part - 1)
        size = packed_bytes(codes.numel(), part)
        padded = torch.nn.functional.pad(values, (0, size * 8 // part - values.numel())).view(-1, size)
        # no two of the shifted rows share a bit, so that the sum stays below 256
        pieces.append((padded << _shifts(part, codes.device)).sum(0, dtype=torch.uint8))
        below += part
    return torch.cat(pieces)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The `count` codes (count,) of type uint8 that `pack` made into flat bytes."""
    if bits == 8:
        return packed ^ 128
    codes, below, start = None, 0, 0
    for part in _parts(bits):
        size = packed_bytes(count, part)
        piece = packed[start : start + size]
        values = ((piece >> _shifts(part, packed.device)) & (2**part - 1)).flatten()[:count]
        codes = values if codes is None else codes | (values << below)
        below, start = below + part, start + size
    assert codes is not None
    return codes


def _parts(bits: int) -> list[int]:
    """The powers of two that make up `bits`, the largest first."""
    return [part for part in (8, 4, 2, 1) if bits & part]


def _shifts(part: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, part, dtype=torch.uint8, device=device).view(-1, 1)
