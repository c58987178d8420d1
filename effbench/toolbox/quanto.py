"""Linear layers on the grids of optimum-quanto, packed and unpacked by our own code.

Its own tensors are unpacked by C++ that is compiled at the first use, into its own folder: minutes on a slow machine,
and if that is cut short, a lock left behind makes every later process wait for ever. Here the library chooses grids
and codes, for which nothing is compiled, and is not needed any more once a system is saved.

Bits stored for each weight of an m x n matrix (closed form, biases left out), the model's dtype having d bits:

    8 bits              8 + d / n
    4 or 2 bits         bits + 2 d / g      groups of g inputs have a scale and a shift
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.toolbox.checks import one_of
from effbench.toolbox.extras import require
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.kernels.cpu import INT8_ROWS, int8_product, int8_rows, takes
from effbench.toolbox.stored import StoredModule

PACKAGE, EXTRA = "optimum.quanto", "quanto"
STEP = 32
"""By how much the library makes groups narrower until they divide a row."""


@cache
def library() -> Any:
    """optimum-quanto.

    Raises `PackageError` where it is not installed.
    """
    require(PACKAGE, EXTRA)
    import optimum.quanto as quanto

    return quanto


def groups_of(in_features: int, most: int) -> int:
    """The width of the groups that the library makes of a row: at most `most`, or the whole row, which is 0."""
    for width in range(most, STEP - 1, -STEP):
        if in_features > most and in_features % width == 0:
            return width
    return 0


class QuantoLinear(StoredModule):
    """A linear layer with weight = scale * code - shift, one pair a group; 8 bits have one scale a row only.

    bits: of a code: 8, 4 or 2.
    group_size: how many inputs of a row share a scale and a shift; 0 for the whole row.
    bias: whether there is one.
    dtype: of scales, shifts and bias, in which weights are computed too.

    On a CPU, a few bfloat16 rows go through an int8 kernel. All else unpacks the codes and multiplies.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = 0,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        one_of("bits", bits, (8, 4, 2))
        super().__init__(
            in_features=in_features,
            out_features=out_features,
            bits=bits,
            group_size=group_size,
            bias=bias,
            dtype=dtype,
        )
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        count, kind = in_features * out_features, getattr(torch, dtype)
        groups = count // (group_size or in_features)
        if bits == 8:
            self.codes: Tensor = nn.Buffer(torch.empty(out_features, in_features, dtype=torch.int8))
        else:
            self.codes = nn.Buffer(torch.empty(packed_bytes(count, bits), dtype=torch.uint8))
            self.shifts: Tensor = nn.Buffer(torch.empty(groups, 1, dtype=kind))
        self.scales: Tensor = nn.Buffer(torch.empty(groups, 1, dtype=kind))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=kind)) if bias else None

    @classmethod
    def pack(cls, linear: nn.Linear, bits: int, most: int) -> Self:
        """The module that rounds the weights of `linear` to the library's grids, groups being `most` inputs wide."""
        quanto, weight = library(), linear.weight.detach().contiguous()
        width = groups_of(linear.in_features, most) if bits < 8 else 0
        dtype = str(weight.dtype).removeprefix("torch.")
        module = cls(linear.in_features, linear.out_features, bits, width, linear.bias is not None, dtype)
        if bits == 8:
            axis = 0 if linear.out_features > 1 else None
            scales = quanto.AbsmaxOptimizer()(weight, quanto.qint8, axis)
            module.codes = torch.ops.quanto.quantize_symmetric(weight, torch.int8, axis, scales)
        else:
            groups = weight.view(-1, width or linear.in_features)
            kind = {4: quanto.qint4, 2: quanto.qint2}[bits]
            scales, shifts = quanto.MaxOptimizer()(groups, kind, 0)
            module.codes = pack(torch.ops.quanto.quantize_affine(groups, bits, 0, None, scales, shifts), bits)
            module.shifts = shifts.view(-1, 1)
        module.scales = scales.view(-1, 1)
        if linear.bias is not None:
            module.bias = linear.bias.detach().clone()
        return module

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix (out, in) that the codes stand for, made anew by each call."""
        if self.bits == 8:
            weight = self.scales * self.codes
        else:
            codes = unpack(self.codes, self.in_features * self.out_features, self.bits)
            weight = (self.scales * codes.view(self.scales.shape[0], -1)).sub_(self.shifts)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.bits == 8 and takes(x, INT8_ROWS) and takes(x, int8_rows(self.codes)):
            scales = self.scales.flatten().float()
            rows = x.reshape(-1, self.in_features).contiguous()
            product = int8_product(rows, self.codes, scales, torch.zeros_like(scales))
            product = product.view(*x.shape[:-1], self.out_features)
            return product if bias is None else product + bias
        return nn.functional.linear(x, self.dequantized(x.dtype), bias)

    @property
    def unpacked(self) -> str | None:
        return None if self.bits == 8 else "codes are unpacked for each product: no kernel here reads these grids"
