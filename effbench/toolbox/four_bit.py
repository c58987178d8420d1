"""What the techniques share that store weights as 4-bit numbers of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique, System
from effbench.toolbox.bitsandbytes import BLOCK_SIZES, EXTRA, FourBitLinear
from effbench.toolbox.checks import one_of
from effbench.toolbox.extras import lacks


@dataclass(frozen=True)
class FourBit(LayerTechnique):
    """Store each weight as one of 16 numbers, those of `kind`, times its block's largest weight.

    block_size: how many weights in a row-major run share a scale.
    double_quant: store the scales in 8 bits too.
    """

    kind: ClassVar[str]
    needs_inputs: ClassVar[bool] = False
    bits: ClassVar[int] = 4

    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        one_of("block_size", self.block_size, BLOCK_SIZES)

    def unfit(self, system: System) -> str | None:
        return lacks("bitsandbytes", EXTRA) or super().unfit(system)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return FourBitLinear.unfit(linear)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return FourBitLinear.pack(linear, self.kind, self.block_size, self.double_quant)
