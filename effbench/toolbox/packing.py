"""From a weight matrix to packed codes: in which layout and on which grids. The one place where quantizers choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from effbench.toolbox.grid import encode, fit_grid
from effbench.toolbox.kernels import words
from effbench.toolbox.kernels.tiles import machine_tile
from effbench.toolbox.packed import PackedLinear, fits_tile
from effbench.toolbox.sparse import drop_zeros, fits_two_four


@dataclass(frozen=True)
class Packing:
    """How the codes of one matrix will be stored.

    bits, group_size, symmetric: as the options of `rtn`.
    scale_dtype: "float16" or "float32", of scales and of zero points that are no codes.
    tile: as in `PackedLinear`; 0 for a 2:4 matrix, whose zeros are not stored unless its codes are the smaller.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str
    tile: int

    @classmethod
    def of(
        cls, linear: nn.Linear, bits: int, group_size: int = 0, symmetric: bool = False, scale_dtype: str = "float16"
    ) -> Self:
        """What suits `linear` and the kernels of this machine."""
        keeps_zeros = bits > 2 and fits_two_four(linear.weight.detach())
        tile = 0 if keeps_zeros else tile_for(linear, bits, group_size, scale_dtype)
        return cls(bits, group_size, symmetric, scale_dtype, tile)

    @property
    def dtype(self) -> torch.dtype:
        """In which scales are stored, so that codes can make up for their rounding."""
        if self.tile in (64, 32):
            return torch.bfloat16
        kind: torch.dtype = getattr(torch, self.scale_dtype)
        return kind

    def groups(self, weight: Tensor) -> Tensor:
        """A `weight` (out, in) as (out, groups, width)."""
        return weight.detach().unflatten(1, (-1, self.group_size or weight.shape[1]))

    def rounded(self, groups: Tensor, bias: Tensor | None, *, mse: bool = False) -> PackedLinear:
        """The layer whose weights are the levels nearest to `groups` (out, groups, width); `mse` as in `fit_grid`."""
        scales, zeros = fit_grid(groups, self.bits, symmetric=self.symmetric, mse=mse, dtype=self.dtype)
        codes = encode(groups, scales, zeros, self.bits).flatten(1)
        return self.pack(codes, scales, zeros, bias, groups.flatten(1))

    def pack(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        *,
        zeros_dtype: str = "codes",
    ) -> PackedLinear:
        """The layer of `codes` (out, in) on grids (out, groups); the zeros of a 2:4 `weight` (out, in) stay zeros."""
        packed = PackedLinear.pack(
            codes,
            scales,
            None if self.symmetric else zeros,
            self.bits,
            bias,
            zeros_dtype=zeros_dtype,
            scale_dtype=self.scale_dtype,
            tile=self.tile,
        )
        return drop_zeros(packed, weight)


def tile_for(linear: nn.Linear, bits: int, group_size: int, scale_dtype: str) -> int:
    """The height of the tiles with which a kernel could compute `linear` from packed codes; 0 if none could.

    They need a bfloat16 model on a CPU, 4, 3 or 2 bits, groups of a multiple of 32 inputs and rows that fill whole
    tiles. 4 bits take the tiles of ATen's kernel where there is one here, all else those of the compiled one.
    Scales asked for in float32 stay in float32, where neither can be used.
    """
    weight = linear.weight
    if scale_dtype != "float16" or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return 0
    tiles = (machine_tile(), words.TILE) if bits == 4 else (words.TILE,)
    width = group_size or linear.in_features
    return next((tile for tile in tiles if tile and fits_tile(tile, linear.out_features, width, bits)), 0)
