"""Weights of -1, 0 and 1 with one scale, and inputs of 8 bits: in training, and packed.

A weight w stands for scale * clamp(round(w / scale), -1, 1), where scale is the mean of |w| over the matrix; a row of
inputs x stands for round(x * factor) / factor with factor = 127 / max|x|. Training and inference round alike.
Source: b1.58 (Ma et al. 2024, arXiv:2402.17764), section 2.

Bits stored for each weight of an m x n matrix (closed form, biases left out):

    packing 2      2 + 32 / (m n)       four weights a byte
    packing 1.6    1.6 + 32 / (m n)     five weights a byte, since 3^5 = 243
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from effbench.toolbox.checks import one_of
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.stored import StoredModule

SMALLEST = 1e-5
"""What a mean of |w| or a largest |x| counts as if it is below that."""
PACKINGS = ("2", "1.6")
"""Bits of a packed weight."""


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

    What is unpacked for a product is dropped after it.
    """

    def __init__(
        self, in_features: int, out_features: int, packing: str = "2", bias: bool = False, dtype: str = "float32"
    ) -> None:
        one_of("packing", packing, PACKINGS)
        super().__init__(in_features=in_features, out_features=out_features, packing=packing, bias=bias, dtype=dtype)
        self.in_features, self.out_features, self.packing = in_features, out_features, packing
        count = in_features * out_features
        size = packed_bytes(count, 2) if packing == "2" else -(-count // 5)
        self.codes: Tensor = nn.Buffer(torch.empty(size, dtype=torch.uint8))
        self.scale: Tensor = nn.Buffer(torch.empty((), dtype=torch.float32))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, packing: str, dtype: torch.dtype) -> Self:
        """The layer that rounds `weight` (out, in); `dtype` is that of the stored `bias` (out,)."""
        trits, scale = ternary(weight.detach())
        module = cls(weight.shape[1], weight.shape[0], packing, bias is not None, str(dtype).removeprefix("torch."))
        digits = (trits + 1).to(torch.uint8)
        module.codes = pack(digits, 2) if packing == "2" else pack_fives(digits)
        module.scale = scale
        if bias is not None:
            module.bias = bias.detach().to(dtype, copy=True)
        return module

    def trits(self) -> Tensor:
        """The weights (out, in) in {-1, 0, 1} as int8, unpacked anew by each call."""
        count = self.out_features * self.in_features
        digits = unpack(self.codes, count, 2) if self.packing == "2" else unpack_fives(self.codes, count)
        return (digits.view(torch.int8) - 1).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        rows = x.numel() // self.in_features
        if (torch.is_grad_enabled() and x.requires_grad) or not self._multiplies_int8(rows, x.device):
            return rounded_product(x, self.trits(), self.scale, bias).to(x.dtype)
        codes, factors = eight_bits(x)
        sums = torch._int_mm(codes.to(torch.int8).view(rows, self.in_features), self.trits().T)
        product = sums.view(*x.shape[:-1], self.out_features) * (self.scale / factors)
        return (product if bias is None else product + bias).to(x.dtype)

    def _multiplies_int8(self, rows: int, device: torch.device) -> bool:
        """Whether torch's int8 product, which is exact, takes these shapes."""
        whole_tiles = rows > 16 and self.in_features % 8 == 0 and self.out_features % 8 == 0
        return rows > 0 and (device.type == "cpu" or (device.type == "cuda" and whole_tiles))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


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
