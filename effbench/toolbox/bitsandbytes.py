"""Linear layers of bitsandbytes: its codes in buffers of our own, its operators called on them.

Its own modules rewrite their weights at the first pass on a CPU with bfloat16 arithmetic, after which gradients are
wrong, unpacking gives garbage and double quantization is undone. Here the layout is chosen once, and kept.

Bits stored for each weight of an m x n matrix (closed form, biases left out):

    4 bits, blocks of b         4 + 32 / b
    with double quantization    4 + 8 / b + 32 / (256 b) + 32 / (m n)
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.toolbox.checks import one_of
from effbench.toolbox.extras import require
from effbench.toolbox.stored import StoredModule

EXTRA = "bitsandbytes"
BLOCK_SIZES = (64, 32, 128, 256, 512, 1024)
"""Widths of blocks that its 4-bit operators know."""
TILE = 32
"""Rows in a tile of the kernel's layout."""
KERNEL_ROWS = 40
"""Up to so many rows its 4-bit kernel beats unpacking (2048 x 5632, one thread with AVX-512)."""
NESTED = 256
"""How many block scales share a scale of their own in double quantization."""


@cache
def library() -> Any:
    """bitsandbytes' functions, with its operators registered.

    Raises `PackageError` where it is not installed.
    """
    require("bitsandbytes", EXTRA)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would speak of a kernel that it did not fetch
    there = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # with this package it fetches a kernel from a hub
    try:
        import bitsandbytes.functional as functional
    finally:
        if there is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = there
    return functional


class FourBitLinear(StoredModule):
    """A linear layer over 4-bit codes of `kind` "nf4" or "fp4", with a float32 scale for each block of weights.

    block_size: how many weights in a row-major run share a scale; runs do not end with a row.
    double_quant: scales are 8-bit codes themselves, with a float32 for each 256 of them and their mean.
    tiled: codes lie as the CPU's bfloat16 kernel reads them (see `FourBitLinear.tiles`).
    bias, dtype: whether there is a bias, and its type.

    A few bfloat16 rows on such a CPU go through the kernel, which rounds scales to bfloat16. On a GPU the library
    chooses between its kernel and unpacking, if no block crosses the end of a row. All else is unpacked.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str,
        block_size: int = 64,
        double_quant: bool = False,
        tiled: bool = False,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        one_of("kind", kind, ("nf4", "fp4"))
        super().__init__(
            in_features=in_features,
            out_features=out_features,
            kind=kind,
            block_size=block_size,
            double_quant=double_quant,
            tiled=tiled,
            bias=bias,
            dtype=dtype,
        )
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.block_size, self.tiled = block_size, tiled
        count = in_features * out_features
        blocks = -(-count // block_size)
        self.codes: Tensor = nn.Buffer(torch.empty(-(-count // 2), dtype=torch.uint8))
        self.scales: Tensor = nn.Buffer(torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        if double_quant:
            self.scales_of_scales: Tensor = nn.Buffer(torch.empty(-(-blocks // NESTED), dtype=torch.float32))
            self.mean_scale: Tensor = nn.Buffer(torch.empty((), dtype=torch.float32))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @staticmethod
    def unfit(linear: nn.Linear) -> str | None:
        """Why `linear` cannot be stored so; `None` if it can."""
        if linear.weight.numel() % 2:
            return f"its {linear.weight.numel()} weights are an odd number, and two share a byte"
        return None if torch.isfinite(linear.weight).all() else "it has weights that are not finite"

    @staticmethod
    def tiles(linear: nn.Linear, block_size: int) -> bool:
        """Whether the kernel here could compute `linear`: bfloat16 on a CPU that has its arithmetic, whole tiles."""
        return tileable(linear.weight.shape, block_size, linear.weight.dtype, linear.weight.device)

    @classmethod
    def pack(cls, linear: nn.Linear, kind: str, block_size: int, double_quant: bool) -> Self:
        """The module that rounds the weights of `linear`."""
        weight = linear.weight.detach().contiguous()
        codes, state = library().quantize_4bit(
            weight, blocksize=block_size, compress_statistics=double_quant, quant_type=kind
        )
        return cls.of(codes, state, linear.bias, cls.tiles(linear, block_size))

    @classmethod
    def of(cls, codes: Tensor, state: Any, bias: Tensor | None, tiled: bool) -> Self:
        """The module over `codes` as the library gives them, whose `state` is the library's."""
        dtype = str(bias.dtype if bias is not None else torch.float32).removeprefix("torch.")
        rows, columns = state.shape
        module = cls(columns, rows, state.quant_type, state.blocksize, state.nested, tiled, bias is not None, dtype)
        module.codes = _to_tiles(codes.flatten(), rows) if tiled else codes.flatten()
        module.scales = state.absmax
        if state.nested:
            module.scales_of_scales, module.mean_scale = state.state2.absmax, state.offset.clone()
        if bias is not None:
            module.bias = bias.detach().clone()
        return module

    def _block_scales(self) -> Tensor:
        """The scale of each block (blocks,) in float32."""
        if not self.options["double_quant"]:
            return self.scales
        code = _dynamic_map(self.scales.device)
        scales = library().dequantize_blockwise(self.scales, absmax=self.scales_of_scales, code=code, blocksize=NESTED)
        return (scales + self.mean_scale).float()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix (out, in) that the codes stand for, made anew by each call."""
        codes = _from_tiles(self.codes, self.out_features) if self.tiled else self.codes
        aligned = self.in_features % self.block_size == 0
        # its CPU kernel starts a block anew with each row, and would multiply by the wrong scales without a word
        shape = (self.out_features, self.in_features) if aligned else (1, self.out_features * self.in_features)
        library()
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.view(-1, 1), self._block_scales(), self.block_size, self.kind, shape, dtype
        )
        return weight.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.numel() // self.in_features
        trained = torch.is_grad_enabled() and x.requires_grad
        if rows and not trained and self._suits_gpu:
            return self._gpu_product(x, bias)
        few = self.tiled and 0 < rows <= KERNEL_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if not few or trained or not _has_kernel():
            return nn.functional.linear(x, self.dequantized(x.dtype), bias)
        scales = self._block_scales().view(self.out_features, -1).bfloat16().T.contiguous()
        shape, code = (self.out_features, self.in_features), _code(self.kind)
        flat = x.reshape(rows, self.in_features).contiguous()
        product = torch.ops.bitsandbytes.gemv_4bit.default(flat, self.codes, shape, scales, code, self.block_size)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if bias is None else product + bias

    def _gpu_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        library()
        nested = {}
        if self.options["double_quant"]:
            code = _dynamic_map(self.scales.device)
            nested = {"absmax_8bit": self.scales, "absmax_code": code, "absmax_offset": self.mean_scale}
        scales, shape = self.scales_of_scales if nested else self.scales, (self.out_features, self.in_features)
        product: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x, self.codes.view(-1, 1), shape, scales, self.block_size, self.kind, bias=bias, **nested
        )
        return product

    @property
    def _suits_gpu(self) -> bool:
        """Whether the codes are on a GPU, and as its kernel reads them: no block crosses the end of a row."""
        return self.codes.is_cuda and not self.tiled and self.in_features % self.block_size == 0

    @property
    def unpacked(self) -> str | None:
        if self._suits_gpu or (self.tiled and not self.codes.is_cuda and _has_kernel()):
            return None
        return "codes are unpacked for each product: no kernel suits such rows, blocks or dtypes here"


def tileable(shape: torch.Size, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel here could compute with a matrix of this shape (out, in) on inputs of this dtype."""
    whole = shape[0] % TILE == 0 and shape[1] % max(block_size, 64) == 0
    return whole and dtype == torch.bfloat16 and device.type == "cpu" and _has_kernel()


@cache
def _has_kernel() -> bool:
    """Whether this CPU has the arithmetic of the 4-bit kernel."""
    return bool(library().has_avx512bf16())


@cache
def _code(kind: str) -> Tensor:
    """The 16 numbers that codes stand for, by which the kernel tells the kinds apart."""
    code: Tensor = library().get_4bit_type(kind, device="cpu")
    return code


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 numbers that codes of scales stand for."""
    numbers: Tensor = library().create_dynamic_map().to(device)
    return numbers


def _to_tiles(codes: Tensor, out_features: int) -> Tensor:
    """Flat bytes of two codes in a row, the first in the high bits, as tiles for the kernel, in as many flat bytes.

    In a tile of 32 rows, 32 bytes hold two columns: the first 16 rows' pairs in the low bits, the others' in the high.
    """
    pairs = torch.stack([codes >> 4, codes & 15], -1).view(-1, TILE, codes.numel() // out_features, 2)
    low, high = pairs.transpose(1, 2).reshape(-1, 2, TILE).unbind(1)
    return (low | high << 4).flatten()


def _from_tiles(packed: Tensor, out_features: int) -> Tensor:
    """What `_to_tiles` was given."""
    tiles = packed.view(-1, TILE)
    pairs = torch.stack([tiles & 15, tiles >> 4], 1).view(out_features // TILE, -1, TILE, 2).transpose(1, 2)
    first, second = pairs.unbind(-1)
    return (first << 4 | second).flatten()
