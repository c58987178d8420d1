"""Random pruning: any weights become zero, the control of every criterion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.sparse import check_options, lowest, misfit, pruned


@dataclass(frozen=True)
class Random(LayerTechnique):
    """Zero weights that are drawn at random, each with the same chance.

    sparsity: share of weights that become zero; a pattern has its own.
    pattern: "unstructured", or "2:4" / "4:8" for so many zeros in each run of so many inputs.
    compare: "matrix" to draw from a whole matrix, "row" to draw as many from each of its rows.
    store: "dense" keeps the zeros, so nothing gets smaller; "bitmask", "csr" and, for that pattern, "2:4" store only
        the other weights and their places.
    seed: of the draw.
    """

    paper: ClassVar[str] = "the control"
    needs_inputs: ClassVar[bool] = False

    sparsity: float = 0.5
    pattern: str = "unstructured"
    compare: str = "matrix"
    store: str = "dense"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.sparsity, self.pattern, self.compare, self.store)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.pattern)

    def apply(self, system: System, data: Data) -> System:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return super().apply(system, data)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        score = torch.rand(linear.weight.shape).to(linear.weight.device)  # drawn alike for every device
        score[linear.weight == 0] = -1  # they go first, or what blocks share would be drawn once for each
        return pruned(linear, lowest(score, self.sparsity, self.pattern, self.compare), self.store)
