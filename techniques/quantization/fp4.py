"""4-bit floats of bitsandbytes: sign, two exponent bits, one mantissa bit, in blocks scaled to their largest.

Its 16 numbers are not those of the standard's E2M1, which `mx` has.
"""

from dataclasses import dataclass
from typing import ClassVar

from effbench.toolbox.four_bit import FourBit


@dataclass(frozen=True)
class Float4(FourBit):
    """Store each weight as the nearest of 16 small floats, times its block's largest weight.

    block_size: how many weights in a row-major run share a scale.
    double_quant: store the scales in 8 bits too.
    """

    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv:2305.14314"
    kind: ClassVar[str] = "fp4"
