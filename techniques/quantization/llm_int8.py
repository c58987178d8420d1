"""LLM.int8(): int8 products row by row, and large inputs left out of the rounding. By bitsandbytes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique, System
from effbench.toolbox.bitsandbytes import EXTRA
from effbench.toolbox.checks import within
from effbench.toolbox.extras import lacks
from effbench.toolbox.llm_int8 import LLMInt8Linear


@dataclass(frozen=True)
class LLMInt8(LayerTechnique):
    """Store weights in 8 bits with a scale a row, and multiply them with inputs rounded to 8 bits.

    threshold: columns in which an input is this large are multiplied unrounded; 0 for none.
    """

    paper: ClassVar[str] = "Dettmers et al. 2022, arXiv:2208.07339"
    needs_inputs: ClassVar[bool] = False
    bits: ClassVar[int] = 8

    threshold: float = 6.0

    def __post_init__(self) -> None:
        within("threshold", self.threshold, 0)

    def unfit(self, system: System) -> str | None:
        return lacks("bitsandbytes", EXTRA) or super().unfit(system)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return None if torch.isfinite(linear.weight).all() else "it has weights that are not finite"

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return LLMInt8Linear.pack(linear, self.threshold)
