"""Numbers of 4 to 8 bits: what a code stands for, and the code of the nearest number.

A float's code is sign, exponent, mantissa from the highest bit down; where the exponent field is 0 the numbers are
evenly spaced down to zero. An integer's code is the number of steps from the lowest. Rounding is to nearest, ties to
even, and what is too large becomes the largest number; codes for infinity and NaN are never made.
Source: OCP Microscaling Formats v1.0 (2023), section 5.3; FP8 as in Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF_BIAS, HALF_MANTISSA = 15, 10
"""Of a float16, in which every float here is exact once its exponent is shifted."""


@dataclass(frozen=True)
class Format:
    """A kind of number. `exponent` and `mantissa` are bits of a float; an integer has no exponent.

    `largest` is the largest number, whose power of two is `largest_power`.
    """

    exponent: int
    mantissa: int
    largest: float
    largest_power: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken from the exponent field."""
        return 2 ** (self.exponent - 1) - 1

    def encode(self, values: Tensor) -> Tensor:
        """Codes (...) of type uint8 of finite `values` (...) of type float32."""
        if not self.exponent:
            most = 2**self.mantissa - 1
            steps = (values * 2 ** (self.mantissa - self.largest_power - 1)).round().clamp(-most, most)
            return (steps + most).to(torch.uint8)
        values = values.clamp(-self.largest, self.largest)
        powers = (torch.frexp(values).exponent - 1).clamp(min=1 - self.bias)  # of each number's leading bit
        digits = torch.ldexp(torch.ldexp(values, self.mantissa - powers).round(), powers - self.mantissa)
        half = (digits * 2.0 ** (self.bias - HALF_BIAS)).half().view(torch.int16).int()
        sign = (half >> 15 & 1) << (self.bits - 1)
        return (sign | (half & 0x7FFF) >> (HALF_MANTISSA - self.mantissa)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (...) of type float32 that codes (...) of type uint8 stand for."""
        if not self.exponent:
            return (codes.float() - (2**self.mantissa - 1)) * 2.0 ** (self.largest_power + 1 - self.mantissa)
        wide = codes.short()
        sign = (wide >> (self.bits - 1)) << 15
        half = sign | (wide & (2 ** (self.bits - 1) - 1)) << (HALF_MANTISSA - self.mantissa)
        return half.view(torch.float16).float() * 2.0 ** (HALF_BIAS - self.bias)


FORMATS = {
    "e2m1": Format(2, 1, 6.0, 2),
    "e2m3": Format(2, 3, 7.5, 2),
    "e3m2": Format(3, 2, 28.0, 4),
    "e4m3": Format(4, 3, 448.0, 8),
    "e5m2": Format(5, 2, 57344.0, 15),
    "int8": Format(0, 7, 1.984375, 0),
    "int4": Format(0, 3, 1.75, 0),
}
"""By the names of the standard; e4m3 is the kind without infinities."""
