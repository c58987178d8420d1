"""The layout that the int4 kernel of ATen reads on a CPU: tiles of some rows, column after column.

Within a tile of t rows, each column takes t / 2 bytes, and byte i holds the codes of rows i (low bits) and i + t / 2
(high bits). The kernel's width t is that of the machine's vectors: 64 rows with AVX-512, 32 with AVX2. What was
packed for one machine would be misread by the kernel of another without an error, so t is kept with the codes, and
`machine_tile` finds out what the kernel here expects.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TILES = (64, 32)
"""Tile heights that are known."""


def pack_tiles(codes: Tensor, tile: int) -> Tensor:
    """`codes` (out, in) of type uint8, all below 16, as flat bytes; `out` is a multiple of `tile`."""
    low, high = codes.unflatten(0, (-1, 2, tile // 2)).unbind(1)
    return (low | (high << 4)).transpose(1, 2).flatten()


def unpack_tiles(packed: Tensor, tile: int, out_features: int) -> Tensor:
    """The codes (out, in) of type uint8 that `pack_tiles` made into flat bytes."""
    rows = packed.view(out_features // tile, -1, tile // 2).transpose(1, 2).contiguous()  # transposed while small
    return torch.stack([rows & 15, rows >> 4], 1).view(out_features, -1)


@cache
def machine_tile() -> int:
    """The tile height that this machine's kernel reads; 0 where there is no kernel or its layout is another."""
    probe = torch.arange(128 * 4, dtype=torch.int32).mul(7).remainder(16).view(128, 4)
    try:
        expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1).flatten()
    except (AttributeError, RuntimeError):  # a torch without this private operator
        return 0
    return next((tile for tile in TILES if torch.equal(pack_tiles(probe.byte(), tile), expected)), 0)
