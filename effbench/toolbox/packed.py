"""A weight matrix as packed codes, with the product computed from them.

Bits stored for each weight, where a group is `width` inputs of one row (closed form, biases left out):

    rows, tiles of 16 rows      bits + (16 + bits) / width     float16 scales, zero points of `bits` bits
                                bits + 16 / width              the same without zero points (`zeros="middle"`)
                                bits + 32 / width              float16 scales, float16 zero points
    tiles of 64 or 32 rows      4 + 32 / width                 as ATen's int4 kernel has it: a (scale, zero) pair
                                                               of bfloat16

There is one copy of a weight, and it is the packed one: what is unpacked for a product is dropped after it.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.grid import decode
from effbench.toolbox.kernels import compiled, of_gpus, words
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.kernels.cpu import INT4_ROWS, INT8_ROWS, int4_product, int8_product, int8_rows, takes
from effbench.toolbox.kernels.tiles import TILES, machine_tile, pack_tiles, unpack_tiles
from effbench.toolbox.stored import StoredModule

WEIGHTS_AT_ONCE = 1 << 18
"""How many weights are held in float32 while a matrix is unpacked on a CPU: what fits a core's own cache."""


class PackedLinear(StoredModule):
    """A linear layer over packed codes: weight = scale * (code - zero), one scale and zero for each group.

    bits: of a code, 1 to 8.
    group_size: how many inputs of a row share a scale; 0 for the whole row.
    zeros: how zero points are stored: "codes" for whole numbers of `bits` bits, "float16" or "float32" for any
        number, "middle" if all are 2^(bits - 1) and none is stored.
    scale_dtype: "float16" or "float32".
    tile: 0, or the height of the tiles in which codes lie for a kernel (see `packing.tile_for`). With 64 and 32,
        scales and zeros are bfloat16, whatever the two options say; with 16, scales and zeros that are not "codes"
        are float16.
    bias, dtype: whether there is a bias, and its type.

    On a CPU, a few bfloat16 rows go through a kernel: tiles through the compiled one or, where there is none, those of
    64 and 32 through ATen's for int4; 8 bits with one scale a row through ATen's for int8 if the inputs are a multiple
    of 16. On a GPU a few rows go through Triton's, of what is not in tiles. All else unpacks the codes and multiplies.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = 0,
        zeros: str = "codes",
        scale_dtype: str = "float16",
        tile: int = 0,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        within("bits", bits, 1, 8)
        one_of("zeros", zeros, ("codes", "float16", "float32", "middle"))
        one_of("scale_dtype", scale_dtype, ("float16", "float32"))
        super().__init__(
            in_features=in_features,
            out_features=out_features,
            bits=bits,
            group_size=group_size,
            zeros=zeros,
            scale_dtype=scale_dtype,
            tile=tile,
            bias=bias,
            dtype=dtype,
        )
        self.in_features, self.out_features, self.bits, self.tile = in_features, out_features, bits, tile
        self.groups = in_features // group_size if group_size else 1
        if group_size and in_features % group_size:
            raise ValueError(f"group_size must divide the {in_features} inputs, got {group_size}")
        self.words = tile == words.TILE
        if tile and not fits_tile(tile, out_features, in_features // self.groups, bits):
            raise ValueError(
                f"tile must be 0 or suit {out_features} rows of {bits}-bit codes in groups of "
                f"{in_features // self.groups} inputs, got {tile}"
            )
        if self.words and (scale_dtype != "float16" or zeros == "float32"):
            raise ValueError(f"tile {tile} has float16 scales and zero points, got {scale_dtype} and {zeros}")
        grids = (self.groups, out_features) if self.words else (out_features, self.groups)
        codes_bytes = packed_bytes(out_features * in_features, bits)
        self.codes: Tensor = nn.Buffer(torch.empty(codes_bytes, dtype=torch.uint8))
        if tile and not self.words:
            self.scales_zeros: Tensor = nn.Buffer(torch.empty(self.groups, out_features, 2, dtype=torch.bfloat16))
        else:
            self.scales: Tensor = nn.Buffer(torch.empty(grids, dtype=getattr(torch, scale_dtype)))
            if zeros == "codes":
                zeros_bytes = packed_bytes(out_features * self.groups, bits)
                self.zeros: Tensor = nn.Buffer(torch.empty(zeros_bytes, dtype=torch.uint8))
            elif zeros != "middle":
                self.zeros = nn.Buffer(torch.empty(grids, dtype=getattr(torch, zeros)))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        bias: Tensor | None = None,
        *,
        zeros_dtype: str = "codes",
        scale_dtype: str = "float16",
        tile: int = 0,
    ) -> Self:
        """The module for `codes` (out, in) of type uint8 on grids with `scales` and `zeros` (out, groups).

        `zeros` is `None` where all zero points are 2^(bits - 1).
        Raises `UnfitError` where a scale or a zero point does not fit in the dtype in which it is to be stored.
        """
        (out_features, in_features), groups = codes.shape, scales.shape[1]
        module = cls(
            in_features,
            out_features,
            bits,
            group_size=in_features // groups if groups > 1 else 0,
            zeros="middle" if zeros is None else zeros_dtype,
            scale_dtype=scale_dtype,
            tile=tile,
            bias=bias is not None,
            dtype=str(bias.dtype if bias is not None else torch.float32).removeprefix("torch."),
        )
        middle = 2 ** (bits - 1)
        if module.words:
            module.codes = words.pack_words(codes, bits)
            module.scales = scales.T.to(torch.float16).contiguous()
            if zeros is not None:
                whole = zeros_dtype == "codes"
                module.zeros = words.pack_masks(zeros.T, bits) if whole else zeros.T.to(torch.float16).contiguous()
        elif tile:
            rounded = scales.bfloat16().float()
            shift = rounded * (middle - zeros.float()) if zeros is not None else torch.zeros_like(rounded)
            module.codes = pack_tiles(codes, tile)
            module.scales_zeros = torch.stack([rounded.T, shift.T], -1).bfloat16()
        else:
            module.codes = pack(codes, bits)
            module.scales = scales.to(module.scales.dtype)
            if zeros is not None:
                whole = zeros_dtype == "codes"
                module.zeros = pack(zeros.to(torch.uint8), bits) if whole else zeros.to(module.zeros.dtype)
        if bias is not None:
            module.bias = bias.detach().clone()
        if not all(buffer.isfinite().all() for name, buffer in module.named_buffers() if name != "bias"):
            raise UnfitError(
                "a scale or zero point is not finite: the weights are not, or they are too large for float16 scales, "
                "where scale_dtype=float32 helps"
            )
        return module

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix (out, in) that the codes stand for, computed in float32 and made anew by each call."""
        if gpu := self._gpu():
            return gpu.unpacked(*self._told_gpu(), dtype)
        kernel = self._compiled() if dtype == torch.bfloat16 else None
        if kernel and self.tile:
            return kernel.unpacked(self._told(), self.out_features, self.in_features)
        if kernel and kernel.vectors and self.bits == 8 and self.groups == 1:
            return kernel.int8_unpacked(*self._int8())
        scales, zeros, shifts = self._grids()
        if self.words:
            codes = words.unpack_words(self.codes, self.out_features, self.in_features, self.bits)
        elif self.tile:
            codes = unpack_tiles(self.codes, self.tile, self.out_features)
        else:
            codes = unpack(self.codes, self.out_features * self.in_features, self.bits)
        codes = codes.view(self.out_features, self.groups, -1)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=codes.device)
        rows = max(1, WEIGHTS_AT_ONCE // self.in_features) if codes.device.type == "cpu" else self.out_features
        for start in range(0, self.out_features, rows):
            some = slice(start, start + rows)
            values = decode(codes[some], scales[some], zeros[some])
            if shifts is not None:
                values += shifts[some].unsqueeze(-1)
            weight[some] = values.flatten(1)
        return weight

    def _grids(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales, zero points and, with ATen's tiles, what is added after them; each (out, groups) in float32."""
        if self.words:
            scales = self.scales.float().T
            if self.options["zeros"] == "middle":
                return scales, torch.full_like(scales, 2 ** (self.bits - 1)), None
            whole = self.options["zeros"] == "codes"
            zeros = words.unpack_masks(self.zeros, self.out_features, self.bits) if whole else self.zeros
            return scales, zeros.float().T, None
        if self.tile:
            scales, shifts = self.scales_zeros.float().transpose(0, 1).unbind(-1)
            return scales, torch.full_like(scales, 8), shifts
        scales = self.scales.float()
        if self.options["zeros"] == "middle":
            return scales, torch.full_like(scales, 2 ** (self.bits - 1)), None
        if self.options["zeros"] == "codes":
            return scales, unpack(self.zeros, scales.numel(), self.bits).view_as(scales).float(), None
        return scales, self.zeros.float(), None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product = self._kernel_product(x)
        if product is None:
            return nn.functional.linear(x, self.dequantized(x.dtype), bias)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if bias is None else product + bias

    def _kernel_product(self, x: Tensor) -> Tensor | None:
        """The rows of `x` times the weight by a kernel; `None` where there is none for it."""
        rows = x.reshape(-1, self.in_features)
        if gpu := self._gpu():
            return gpu.product(rows.contiguous(), *self._told_gpu()) if gpu.takes(x) else None
        kernel = self._compiled() if self.tile and takes(x, compiled.ROWS) else None
        # without vectors of its own, ATen's kernel is the faster one for its tiles
        if kernel and len(rows) <= kernel.rows and (self.words or kernel.vectors):
            return kernel.product(rows.contiguous(), self._told(), self.out_features)
        if self.tile and self.tile == machine_tile() and takes(x, INT4_ROWS):
            return int4_product(rows.contiguous(), self.codes, self.scales_zeros)
        if self.bits == 8 and self.groups == 1 and takes(x, INT8_ROWS):
            codes, scales, zeros = self._int8()
            if len(rows) <= int8_rows(codes):
                return int8_product(rows.contiguous(), codes, scales, zeros)
        return None

    def _int8(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of codes of 8 bits with one grid a row, the codes (out, in) as int8 and float32 scales and zeros (out,)."""
        scales, zeros, _ = self._grids()
        codes = self.codes.view(torch.int8).view(self.out_features, self.in_features)
        return codes, scales.flatten(), zeros.flatten() - 128

    def _compiled(self) -> compiled.Kernel | None:
        """The compiled kernel, if there may be one for these codes where they are."""
        able = self.tile or (self.bits == 8 and self.groups == 1)
        return compiled.kernel() if able and self.codes.device.type == "cpu" else None

    def _gpu(self) -> Any:
        """The kernels of GPUs, if the codes are on one and these can read them."""
        if self.tile or not self.codes.is_cuda or not (kernels := of_gpus()):
            return None
        return kernels if kernels.fits((self.out_features, self.in_features), self.groups, self.bits) else None

    def _told_gpu(self) -> tuple[Any, ...]:
        """What they have to know of the weight."""
        zeros, shape = getattr(self, "zeros", None), (self.out_features, self.in_features)
        return self.codes, self.scales, zeros, self.options["zeros"], shape, self.bits

    def _told(self) -> tuple[Any, ...]:
        """What the compiled kernel has to know of the weight."""
        grids, kind = (self.scales, self.options["zeros"]) if self.words else (self.scales_zeros, "tiles")
        zeros = self.zeros if kind in ("codes", "float16") else None
        shape = self.out_features, self.in_features
        return compiled.weights(self.codes, grids, zeros, shape, self.groups, self.bits, self.tile, kind)

    @property
    def simulated(self) -> str | None:
        real = self.codes.device.type in ("cpu", "meta") or self._gpu()
        return None if real else "no kernel here multiplies such packed codes: they are unpacked for each product"

    @property
    def unpacked(self) -> str | None:
        if self.simulated or self._gpu() or (self.bits == 8 and self.groups == 1):
            return None
        if not self.tile:
            return "codes are unpacked for each product: no kernel suits such rows, groups or dtypes"
        if self.tile == machine_tile() or self._compiled():
            return None
        return f"codes are unpacked for each product: {compiled.absent()}"


def misfit(linear: nn.Linear, group_size: int) -> str | None:
    """Why the rows of `linear` cannot be cut into groups of `group_size` inputs; `None` if they can, or for 0."""
    if group_size and linear.in_features % group_size:
        return f"its {linear.in_features} inputs do not divide into groups of {group_size}"
    return None


def fits_tile(tile: int, out_features: int, width: int, bits: int) -> bool:
    """Whether `out_features` rows of codes, in groups of `width` inputs, can be laid out in tiles of that height."""
    known = bits in words.WIDTHS if tile == words.TILE else bits == 4 and tile in TILES
    return known and out_features % tile == 0 and width % words.STEP == 0
