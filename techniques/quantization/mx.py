"""Microscaling formats: weights as 4-, 6- or 8-bit floats in blocks of 32 or 16 that share a scale. No data.

What accelerators of the latest generation multiply natively. Elsewhere, as here, the numbers are unpacked for each
product: quality and bytes are those of the format, speed is not.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.block_scaled import BLOCK_FORMATS, BlockScaledLinear
from effbench.toolbox.checks import one_of


@dataclass(frozen=True)
class Microscaling(LayerTechnique):
    """Store each weight as the nearest number of a block format, packed, and compute from the packed numbers.

    format: mxfp4, mxfp6_e3m2, mxfp6_e2m3, mxfp8 (E4M3), mxfp8_e5m2, mxint8 and mxint4 have a power of two for each
        32 inputs; nvfp4 an E4M3 scale for each 16 and a float32 for the matrix.
    """

    paper: ClassVar[str] = "Rouhani et al. 2023, arXiv:2310.10537; OCP Microscaling Formats v1.0"
    needs_inputs: ClassVar[bool] = False

    format: str = "mxfp4"

    def __post_init__(self) -> None:
        one_of("format", self.format, tuple(BLOCK_FORMATS))

    def promised_bits(self) -> float:
        return BLOCK_FORMATS[self.format].element.bits

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        width = BLOCK_FORMATS[self.format].width
        if linear.in_features % width:
            return f"its {linear.in_features} inputs do not divide into the blocks of {width} of {self.format}"
        return None

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return BlockScaledLinear.pack(linear.weight, linear.bias, self.format)
