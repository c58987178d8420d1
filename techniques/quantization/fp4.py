"""4-bit floats of bitsandbytes: sign, two exponent bits, one mantissa bit, in blocks scaled to their largest.

Its 16 numbers are not those of the standard's E2M1, which `mx` has.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique, System
from effbench.toolbox.bitsandbytes import BLOCK_SIZES, EXTRA, FourBitLinear
from effbench.toolbox.checks import one_of
from effbench.toolbox.extras import lacks


@dataclass(frozen=True)
class Float4(LayerTechnique):
    """Store each weight as the nearest of 16 small floats, times its block's largest weight.

    block_size: how many weights in a row-major run share a scale.
    double_quant: store the scales in 8 bits too.
    """

    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv:2305.14314"
    needs_inputs: ClassVar[bool] = False

    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        one_of("block_size", self.block_size, BLOCK_SIZES)

    def unfit(self, system: System) -> str | None:
        return lacks("bitsandbytes", EXTRA) or super().unfit(system)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return FourBitLinear.unfit(linear)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return FourBitLinear.pack(linear, "fp4", self.block_size, self.double_quant)
