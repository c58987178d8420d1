"""Products of 8-bit inputs with 8-bit weights, summed up in whole numbers.

Bits stored for each weight of an m x n matrix (closed form, biases left out): 8 + 16 / n, with float16 scales.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.toolbox.checks import one_of
from effbench.toolbox.stored import StoredModule

SMALLEST = 1e-5
"""What the largest number of a row counts as if it is below that."""
GPU_ROWS, GPU_MULTIPLE = 32, 8
"""torch's int8 product on a GPU takes no fewer than 17 rows, and matrices with multiples of 8 only."""


class Int8Linear(StoredModule):
    """A linear layer over int8 weights with a scale for each output; each row of inputs is rounded to int8 as well.

    Both are symmetric: the largest absolute value of a row is 127. The product is torch's int8 one, which is exact;
    where there is none for the shapes, the same numbers are multiplied in float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale_dtype: str = "float16",
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        one_of("scale_dtype", scale_dtype, ("float16", "float32"))
        super().__init__(
            in_features=in_features, out_features=out_features, scale_dtype=scale_dtype, bias=bias, dtype=dtype
        )
        self.in_features, self.out_features = in_features, out_features
        self.codes: Tensor = nn.Buffer(torch.empty(out_features, in_features, dtype=torch.int8))
        self.scales: Tensor = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, scale_dtype)))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(cls, linear: nn.Linear, scale_dtype: str = "float16") -> Self:
        """The layer that rounds the weight of `linear`.

        Raises `UnfitError` where a scale is not finite in the dtype in which it is to be stored.
        """
        bias = linear.bias
        dtype = str(bias.dtype if bias is not None else torch.float32).removeprefix("torch.")
        module = cls(linear.in_features, linear.out_features, scale_dtype, bias is not None, dtype)
        weight = linear.weight.detach().float()
        module.scales = (weight.abs().amax(1).clamp(min=SMALLEST) / 127).to(module.scales.dtype)
        if not module.scales.isfinite().all():
            raise UnfitError("a weight is not finite, or too large for float16 scales, where scale_dtype=float32 helps")
        codes = (weight / module.scales.float().unsqueeze(1)).round_()
        module.codes = codes.clamp_(-127, 127).to(torch.int8)
        if bias is not None:
            module.bias = bias.detach().clone()
        return module

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        steps = rows.detach().abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / 127
        codes = rows / steps
        if torch.is_grad_enabled() and x.requires_grad:  # the gradient goes straight through the rounding
            rounded = codes + (codes.detach().round() - codes.detach())
            sums = nn.functional.linear(rounded, self.codes.float())
        elif multiplies_int8(len(rows), self.codes.shape, x.device):
            sums = int8_product(codes.round_().to(torch.int8), self.codes).float()
        else:
            sums = nn.functional.linear(codes.round_(), self.codes.float())
        product = sums * steps * self.scales.float()
        product = product if self.bias is None else product + self.bias.float()
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)


def multiplies_int8(rows: int, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether torch's int8 product takes so many rows and a matrix of `shape` (out, in)."""
    whole_tiles = all(size % GPU_MULTIPLE == 0 for size in shape)
    return rows > 0 and (device.type == "cpu" or (device.type == "cuda" and whole_tiles))


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """The exact int32 sums (rows, out) of int8 `x` (rows, in) times the transpose of int8 `weight` (out, in)."""
    missing = max(0, GPU_ROWS - len(x)) if x.is_cuda else 0
    padded = nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    return torch._int_mm(padded, weight.T)[: len(x)]
