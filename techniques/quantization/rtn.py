"""Round to nearest: each weight takes the nearest level of a uniform grid. No data, no correction of errors.

The baseline that every other quantizer has to beat. One grid a row by default, as in GPTQ's released code: it suits
every width, and ATen's CPU kernels can compute with it. Groups of 128 or 64 cost 0.16 or 0.31 bits a weight at 4 bits
and lose far less at 2 and 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.packed import misfit
from effbench.toolbox.packing import Packing


@dataclass(frozen=True)
class RoundToNearest(LayerTechnique):
    """Store each weight as the nearest of 2^bits evenly spaced levels, packed, and compute from the packed codes.

    bits: of a code: 8, 4, 3 or 2.
    group_size: how many inputs of a row share a grid; 0 for the whole row.
    symmetric: grids reach as far below zero as above and store no zero point.
    mse: shrink each grid to the range with the least weight error; it need not lessen the output's error.
    scale_dtype: "float16", or "float32" for comparing with published code. Where the int4 kernel computes, scales
        and zero points are the bfloat16 pairs that it reads.
    """

    paper: ClassVar[str] = "the baseline of Frantar et al. 2023, arXiv:2210.17323"
    needs_inputs: ClassVar[bool] = False

    bits: int = 4
    group_size: int = 0
    symmetric: bool = False
    mse: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (8, 4, 3, 2))
        within("group_size", self.group_size, 0)
        one_of("scale_dtype", self.scale_dtype, ("float16", "float32"))

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.group_size)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        packing = Packing.of(linear, self.bits, self.group_size, self.symmetric, self.scale_dtype)
        return packing.rounded(packing.groups(linear.weight), linear.bias, mse=self.mse)
