"""Magnitude pruning: the smallest weights of each matrix become zero.

It looks at no data: the baseline that every other criterion has to beat.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.sparse import check_options, lowest, misfit, pruned


@dataclass(frozen=True)
class Magnitude(LayerTechnique):
    """Zero the weights of least absolute value.

    sparsity: share of weights that become zero; a pattern has its own.
    pattern: "unstructured", or "2:4" / "4:8" for so many zeros in each run of so many inputs.
    compare: "matrix" to look for the smallest in a whole matrix, "row" in each of its rows, as `wanda` does.
    store: "dense" keeps the zeros, so nothing gets smaller; "bitmask", "csr" and, for that pattern, "2:4" store only
        the other weights and their places.
    """

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    needs_inputs: ClassVar[bool] = False

    sparsity: float = 0.5
    pattern: str = "unstructured"
    compare: str = "matrix"
    store: str = "dense"

    def __post_init__(self) -> None:
        check_options(self.sparsity, self.pattern, self.compare, self.store)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.pattern)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        score = linear.weight.detach().float().abs()
        return pruned(linear, lowest(score, self.sparsity, self.pattern, self.compare), self.store)
