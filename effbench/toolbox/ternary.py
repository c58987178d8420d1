"""Weights of -1, 0 and 1 with one scale, and inputs of 8 bits: in training, and packed.

A weight w stands for scale * clamp(round(w / scale), -1, 1), where scale is the mean of |w| over the matrix; a row of
inputs x stands for round(x * factor) / factor with factor = 127 / max|x|. Training and inference round alike.
Source: b1.58 (Ma et al. 2024, arXiv:2402.17764), section 2.

Bits stored for each weight of an m x n matrix (closed form, biases left out):

    packing 2      2 + 32 / (m n)       four weights a byte
    packing 1.6    1.6 + 32 / (m n)     five weights a byte, since 3^5 = 243
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from effbench.toolbox.checks import one_of
from effbench.toolbox.int8 import int8_product, multiplies_int8
from effbench.toolbox.kernels import compiled, words
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.kernels.cpu import takes
from effbench.toolbox.packed import fits_tile
from effbench.toolbox.stored import StoredModule

SMALLEST = 1e-5
"""What a mean of |w| or a largest |x| counts as if it is below that."""
PACKINGS = ("2", "1.6")
"""Bits of a packed weight."""


@cache
def _ones(count: int) -> Tensor:
    """Scales of 1 (1, count): the kernel's own are by row, and there is one for a whole ternary matrix."""
    return torch.ones(1, count, dtype=torch.float16)


class _Rounded(torch.autograd.Function):
    """Whole numbers between two bounds; the gradient goes straight through, beyond the bounds too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: int, high: int) -> Tensor:
        return values.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) in {-1, 0, 1} and the scale () of a weight matrix (out, in), both float32."""
    weight = weight.float()
    scale = weight.detach().abs().mean().clamp(min=SMALLEST)
    return _Rounded.apply(weight * (1 / scale), -1, 1), scale


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., in) in [-128, 127] of each row of `x`, and the factors (..., 1) that gave them, both float32."""
    x = x.float()
    factors = 127 / x.detach().abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return _Rounded.apply(x * factors, -128, 127), factors


def rounded_product(x: Tensor, trits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x` (..., in), rounded to 8 bits, times the transpose of scale * trits (out, in), plus `bias` (out,).

    Codes are multiplied and scaled afterwards. As bfloat16 holds them exactly, their sums are exact but for a last
    rounding, under autocast too.
    """
    codes, factors = eight_bits(x)
    # sums of codes would soon be too large for float16
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    sums = functional.linear(codes.to(dtype), trits.to(dtype))
    product = sums.float() * (scale / factors)
    return (product if bias is None else product + bias).to(sums.dtype)


class TernaryTraining(nn.Module):
    """What stands in for `linear` while training: float32 weights, rounded in every pass as `TernaryLinear` has them.

    The mean of |w| counts as a constant in the gradient, which goes straight through both roundings.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float().clone(memory_format=torch.contiguous_format))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return rounded_product(x, *ternary(self.weight), self.bias)


class TernaryLinear(StoredModule):
    """A linear layer over packed weights in {-1, 0, 1} with one float32 scale; each row of inputs is rounded to int8.

    packing: bits of a weight, "2" or "1.6".
    bias, dtype: whether there is a bias, and its type.
    tile: 0, or that of the compiled kernel, in whose layout the codes then are.

    On a CPU, a few bfloat16 rows go through the compiled kernel if the codes are laid out for it. All else unpacks
    them for a product and drops what it unpacked.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packing: str = "2",
        bias: bool = False,
        dtype: str = "float32",
        tile: int = 0,
    ) -> None:
        one_of("packing", packing, PACKINGS)
        if tile and (packing != "2" or not fits_tile(tile, out_features, in_features, 2)):
            raise ValueError(f"tile must be 0 or suit {out_features} rows of {in_features} weights, got {tile}")
        options = {"packing": packing, "bias": bias, "dtype": dtype, "tile": tile}
        super().__init__(in_features=in_features, out_features=out_features, **options)
        self.in_features, self.out_features, self.packing, self.tile = in_features, out_features, packing, tile
        count = in_features * out_features
        size = packed_bytes(count, 2) if packing == "2" else -(-count // 5)
        self.codes: Tensor = nn.Buffer(torch.empty(size, dtype=torch.uint8))
        self.scale: Tensor = nn.Buffer(torch.empty((), dtype=torch.float32))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, packing: str, dtype: torch.dtype) -> Self:
        """The layer that rounds `weight` (out, in); `dtype` is that of the stored `bias` (out,)."""
        trits, scale = ternary(weight.detach())
        rows, columns = weight.shape
        able = packing == "2" and dtype == torch.bfloat16 and weight.device.type == "cpu"
        tile = words.TILE if able and fits_tile(words.TILE, rows, columns, 2) else 0
        module = cls(columns, rows, packing, bias is not None, str(dtype).removeprefix("torch."), tile)
        digits = (trits + 1).to(torch.uint8)
        if tile:
            module.codes = words.pack_words(digits + 1, 2)  # the kernel's middle is 2
        else:
            module.codes = pack(digits, 2) if packing == "2" else pack_fives(digits)
        module.scale = scale
        if bias is not None:
            module.bias = bias.detach().to(dtype, copy=True)
        return module

    def trits(self) -> Tensor:
        """The weights (out, in) in {-1, 0, 1} as int8, unpacked anew by each call."""
        if self.tile and (kernel := self._kernel()):
            return kernel.unpacked(*self._told()).to(torch.int8)
        if self.tile:
            codes = words.unpack_words(self.codes, self.out_features, self.in_features, 2)
            return codes.view(self.out_features, self.in_features).to(torch.int8).sub_(2)
        count = self.out_features * self.in_features
        digits = unpack(self.codes, count, 2) if self.packing == "2" else unpack_fives(self.codes, count)
        return (digits.view(torch.int8) - 1).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        rows = x.numel() // self.in_features
        trained = torch.is_grad_enabled() and x.requires_grad
        if trained or not multiplies_int8(rows, (self.out_features, self.in_features), x.device):
            return rounded_product(x, self.trits(), self.scale, bias).to(x.dtype)
        codes, factors = eight_bits(x)
        if takes(x, compiled.ROWS) and (kernel := self._kernel()) and rows <= kernel.rows:
            told, _, _ = self._told()
            sums = kernel.product(codes.to(torch.bfloat16).view(rows, self.in_features), told, self.out_features)
            product = sums.float().view(*x.shape[:-1], self.out_features) * (self.scale / factors)
            return (product if bias is None else product + bias).to(x.dtype)
        sums = int8_product(codes.to(torch.int8).view(rows, self.in_features), self.trits())
        product = sums.view(*x.shape[:-1], self.out_features) * (self.scale / factors)
        return (product if bias is None else product + bias).to(x.dtype)

    def _kernel(self) -> compiled.Kernel | None:
        """The compiled kernel, if there may be one for these codes where they are."""
        return compiled.kernel() if self.tile and self.codes.device.type == "cpu" else None

    def _told(self) -> tuple[tuple[Any, ...], int, int]:
        """What the compiled kernel has to know of the weights in {-1, 0, 1}, and their shape."""
        shape = self.out_features, self.in_features
        return compiled.weights(self.codes, _ones(self.out_features), None, shape, 1, 2, self.tile, "middle"), *shape

    @property
    def unpacked(self) -> str | None:
        if not self.tile:
            return "codes are unpacked for each product: no kernel suits such rows, packing or dtypes"
        if self.codes.device.type not in ("cpu", "meta"):
            return "codes are unpacked for each product: no kernel here multiplies ternary codes"
        return None if compiled.kernel() else f"codes are unpacked for each product: {compiled.absent()}"


def pack_fives(digits: Tensor) -> Tensor:
    """`digits` (any shape) of type uint8 in {0, 1, 2} as flat bytes, five to a byte.

    Of n bytes, byte i holds digits i, i + n, ... of a number below 243, stored as the fraction of 256 that it is of
    243, rounded up: multiplied by 3, its next digit steps over 256.
    """
    digits = digits.flatten()
    size = -(-digits.numel() // 5)
    padded = functional.pad(digits, (0, 5 * size - digits.numel())).view(5, size).int()
    number = torch.zeros_like(padded[0])
    for row in padded:
        number = 3 * number + row
    return ((256 * number + 242) // 243).to(torch.uint8)


def unpack_fives(packed: Tensor, count: int) -> Tensor:
    """The `count` digits (count,) of type uint8 that `pack_fives` made into flat bytes."""
    digits = torch.empty(5, packed.numel(), dtype=torch.uint8, device=packed.device)
    rest = packed.short()
    for row in digits:
        rest *= 3
        row.copy_(rest >> 8)
        rest &= 255
    return digits.flatten()[:count]
