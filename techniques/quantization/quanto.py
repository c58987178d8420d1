"""Optimum-quanto: rounding to grids that reach from a group's smallest weight to its largest. By optimum-quanto."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique, System
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.extras import lacks
from effbench.toolbox.quanto import EXTRA, PACKAGE, STEP, QuantoLinear


@dataclass(frozen=True)
class Quanto(LayerTechnique):
    """Store each weight as the library's integer code, with a scale and, below 8 bits, a shift for each group.

    bits: of a code: 8, 4 or 2.
    group_size: how many inputs of a row share a grid at most, a multiple of 32; less where they would not divide the
        row, and the whole row at 8 bits, where it is no wider, or where not even 32 divide it. 0 for the whole row.
    """

    paper: ClassVar[str] = "the library optimum-quanto"
    needs_inputs: ClassVar[bool] = False

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (8, 4, 2))
        within("group_size", self.group_size, 0)
        if self.group_size % STEP:
            raise ValueError(f"group_size must be a multiple of {STEP}, as the library's groups are, or 0")

    def unfit(self, system: System) -> str | None:
        return lacks(PACKAGE, EXTRA) or super().unfit(system)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return None if torch.isfinite(linear.weight).all() else "it has weights that are not finite"

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return QuantoLinear.pack(linear, self.bits, self.group_size)
