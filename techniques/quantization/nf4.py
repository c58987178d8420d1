"""4-bit NormalFloat: codes for the quantiles of normal weights, in blocks scaled to their largest. By bitsandbytes."""

from dataclasses import dataclass
from typing import ClassVar

from effbench.toolbox.four_bit import FourBit


@dataclass(frozen=True)
class NormalFloat(FourBit):
    """Store each weight as the nearest of 16 quantiles of a normal distribution, times its block's largest weight.

    block_size: how many weights in a row-major run share a scale.
    double_quant: store the scales in 8 bits too.
    """

    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv:2305.14314"
    kind: ClassVar[str] = "nf4"
