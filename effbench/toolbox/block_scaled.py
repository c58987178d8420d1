"""A weight matrix of small floats in blocks that share a scale, with the product computed from them.

Bits stored for each weight of an m x n matrix (closed form, biases left out):

    mxfp4, mxint4           4 + 8 / 32              mxfp6_e3m2, mxfp6_e2m3      6 + 8 / 32
    mxfp8, mxfp8_e5m2, mxint8   8 + 8 / 32          nvfp4       4 + 8 / 16 + 32 / (m n)

MX scales are powers of two (E8M0): the power of the block's largest weight less that of the format's largest number,
so that a block's largest weights may be cut. NVFP4 scales are E4M3 numbers times one float32 of the whole matrix, and
take a block's largest weight to the format's largest number, up to rounding.
Sources: OCP Microscaling Formats v1.0 (2023), section 6.3; NVIDIA 2025, arXiv:2509.25149 (NVFP4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.toolbox.checks import one_of
from effbench.toolbox.floats import FORMATS, Format
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.stored import StoredModule

E8M0_BIAS = 127
SMALLEST_E4M3 = 2.0**-9
"""Blocks of tiny weights share it rather than become zero."""
WEIGHTS_AT_ONCE = 1 << 18
"""How many weights are held in float32 while a matrix is unpacked."""


@dataclass(frozen=True)
class BlockFormat:
    """How blocks of `width` inputs of a row are stored; `powers`: scales are powers of two."""

    element: Format
    width: int = 32
    powers: bool = True


BLOCK_FORMATS = {
    "mxfp4": BlockFormat(FORMATS["e2m1"]),
    "mxfp6_e3m2": BlockFormat(FORMATS["e3m2"]),
    "mxfp6_e2m3": BlockFormat(FORMATS["e2m3"]),
    "mxfp8": BlockFormat(FORMATS["e4m3"]),
    "mxfp8_e5m2": BlockFormat(FORMATS["e5m2"]),
    "mxint8": BlockFormat(FORMATS["int8"]),
    "mxint4": BlockFormat(FORMATS["int4"]),
    "nvfp4": BlockFormat(FORMATS["e2m1"], width=16, powers=False),
}


class BlockScaledLinear(StoredModule):
    """A linear layer over packed numbers of `format`, one of `BLOCK_FORMATS`; weight = number * its block's scale.

    bias, dtype: whether there is a bias, and its type.

    No kernel here multiplies these numbers: codes are unpacked for a product, and what is unpacked is dropped.
    """

    def __init__(
        self, in_features: int, out_features: int, format: str, bias: bool = False, dtype: str = "float32"
    ) -> None:
        one_of("format", format, tuple(BLOCK_FORMATS))
        super().__init__(in_features=in_features, out_features=out_features, format=format, bias=bias, dtype=dtype)
        self.in_features, self.out_features, self.format = in_features, out_features, BLOCK_FORMATS[format]
        if in_features % self.format.width:
            raise ValueError(f"{format} needs inputs in blocks of {self.format.width}, got {in_features}")
        blocks = in_features // self.format.width
        size = packed_bytes(out_features * in_features, self.format.element.bits)
        self.codes: Tensor = nn.Buffer(torch.empty(size, dtype=torch.uint8))
        self.scales: Tensor = nn.Buffer(torch.empty(out_features, blocks, dtype=torch.uint8))
        if not self.format.powers:
            self.matrix_scale: Tensor = nn.Buffer(torch.empty((), dtype=torch.float32))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, format: str) -> Self:
        """The module that rounds `weight` (out, in).

        Raises `UnfitError` for weights that are not finite.
        """
        if not weight.isfinite().all():
            raise UnfitError("it has weights that are not finite")
        dtype = str(bias.dtype if bias is not None else torch.float32).removeprefix("torch.")
        module = cls(weight.shape[1], weight.shape[0], format, bias is not None, dtype)
        kind = module.format
        blocks = weight.detach().float().unflatten(1, (-1, kind.width))
        largest = blocks.abs().amax(-1)
        if kind.powers:
            powers = torch.frexp(largest).exponent - 1 - kind.element.largest_power
            powers = powers.masked_fill(largest == 0, -E8M0_BIAS).clamp(-E8M0_BIAS, E8M0_BIAS)
            module.scales = (powers + E8M0_BIAS).to(torch.uint8)
        else:
            scales = FORMATS["e4m3"]
            module.matrix_scale = (largest.max() / (kind.element.largest * scales.largest)).clamp(min=1e-30)
            ideal = largest / kind.element.largest / module.matrix_scale
            module.scales = scales.encode(ideal.clamp(min=SMALLEST_E4M3))
        steps = module._block_scales().unsqueeze(-1)
        numbers = torch.where(steps > 0, blocks / steps, 0)
        module.codes = pack(kind.element.encode(numbers), kind.element.bits)
        if bias is not None:
            module.bias = bias.detach().clone()
        return module

    def _block_scales(self) -> Tensor:
        """Scales (out, blocks) in float32."""
        if self.format.powers:
            return (self.scales.int() << 23).view(torch.float32)  # the same exponent field; the lowest, 2^-127, is 0
        return FORMATS["e4m3"].decode(self.scales) * self.matrix_scale

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix (out, in) that the codes stand for, computed in float32 and made anew by each call."""
        element = self.format.element
        codes = unpack(self.codes, self.out_features * self.in_features, element.bits)
        codes = codes.view(self.out_features, -1, self.format.width)
        scales = self._block_scales().unsqueeze(-1)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=codes.device)
        rows = max(1, WEIGHTS_AT_ONCE // self.in_features)
        for start in range(0, self.out_features, rows):
            some = slice(start, start + rows)
            weight[some] = (element.decode(codes[some]) * scales[some]).flatten(1)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantized(x.dtype), bias)

    @property
    def simulated(self) -> str | None:
        return f"no kernel here multiplies {self.options['format']}: it is unpacked for each product"
