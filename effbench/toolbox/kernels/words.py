"""The layout that the compiled kernel reads: tiles of 16 rows, 32 columns at a time.

A width of 3 bits is cut into parts of 2 and 1, and the parts are stored one after the other. Within a part of w bits
and a tile, a run of 32 / w columns is 32 words of 16 bits, two for each row: the first holds the codes of the run's
even columns from its lowest bits upward, the second those of the odd ones. So a shift by w gives the codes of all 16
rows in two neighbouring columns.

Zero points are bit masks: for each group of inputs, each 16 rows and each bit, a word with one bit a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE, STEP = 16, 32
"""Rows of a tile, and columns that are read at a time: both have to divide a matrix, the latter its groups too."""
WIDTHS = (4, 3, 2)
"""Bits of codes that can be laid out so."""


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """`codes` (out, in) of type uint8, all below 2^bits, as flat bytes."""
    pieces, below = [], 0
    for part in _parts(bits):
        each = 16 // part
        runs = ((codes >> below) & (2**part - 1)).view(-1, TILE, codes.shape[1] // (2 * each), each, 2)
        pieces.append(_words(runs.permute(0, 2, 1, 4, 3), part))
        below += part
    return torch.cat(pieces)


def unpack_words(packed: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """The codes (out, in) of type int16 that `pack_words` made into flat bytes."""
    codes, below, start = None, 0, 0
    for part in _parts(bits):
        size, each = out_features * in_features * part // 8, 16 // part
        # both words of a row at once: a shift and a mask leave two neighbouring columns, 16 bits each
        rows = packed[start : start + size].view(torch.int32).view(-1, in_features // (2 * each), TILE).transpose(1, 2)
        shifts = torch.arange(0, 16, part, dtype=torch.int32, device=packed.device)
        pairs = torch.empty(*rows.shape, each, dtype=torch.int32, device=packed.device)
        torch.bitwise_right_shift(rows.unsqueeze(-1), shifts, out=pairs)
        pairs = pairs.bitwise_and_((2**part - 1) * 0x10001).view(out_features, -1)
        codes = pairs if codes is None else codes.add_(pairs, alpha=2**below)
        below, start = below + part, start + size
    assert codes is not None
    return codes.view(torch.int16)


def pack_masks(zeros: Tensor, bits: int) -> Tensor:
    """Zero points (groups, out), all below 2^bits, as flat bytes."""
    rows = zeros.to(torch.uint8).reshape(-1, 1, TILE)
    return _words((rows >> torch.arange(bits, dtype=torch.uint8, device=rows.device).view(-1, 1)) & 1, 1)


def unpack_masks(packed: Tensor, out_features: int, bits: int) -> Tensor:
    """The zero points (groups, out) of type uint8 that `pack_masks` made into flat bytes."""
    planes = _codes(packed, 1).view(-1, bits, TILE)
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    return (planes << shifts).sum(1, dtype=torch.uint8).view(-1, out_features)


def _parts(bits: int) -> tuple[int, ...]:
    return (2, 1) if bits == 3 else (bits,)


def _words(values: Tensor, part: int) -> Tensor:
    """Words of 16 bits as flat bytes, the low one first, from the `values` (..., 16 / part) that each holds."""
    halves = values.contiguous().view(-1, 2, 8 // part)
    shifts = torch.arange(0, 8, part, dtype=torch.uint8, device=values.device)
    return (halves << shifts).sum(-1, dtype=torch.uint8).flatten()


def _codes(packed: Tensor, part: int) -> Tensor:
    """What `_words` was given, flat."""
    shifts = torch.arange(0, 8, part, dtype=torch.uint8, device=packed.device)
    return ((packed.view(-1, 1) >> shifts) & (2**part - 1)).flatten()
