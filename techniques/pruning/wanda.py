"""Wanda: a weight counts by its size times the norm of its inputs, and is compared within its row.

A weight that multiplies large inputs stays even where it is small. Nothing is updated, so that one pass over the
calibration text is all it costs.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import within
from effbench.toolbox.sparse import check_options, lowest, misfit, pruned


@dataclass(frozen=True)
class Wanda(LayerTechnique):
    """Zero the weights of least |w| times the Euclidean norm of the inputs that it multiplies.

    sparsity: share of weights that become zero; a pattern has its own.
    pattern: "unstructured", or "2:4" / "4:8" for so many zeros in each run of so many inputs.
    compare: "row" to look for the lowest in each row, "matrix" in a whole matrix, as `magnitude` does.
    store: "dense" keeps the zeros, so nothing gets smaller; "bitmask", "csr" and, for that pattern, "2:4" store only
        the other weights and their places.
    samples: how many calibration sequences are read.
    """

    paper: ClassVar[str] = "Sun et al. 2024, arXiv:2306.11695"
    statistics: ClassVar[tuple[str, ...]] = ("square_sum",)

    sparsity: float = 0.5
    pattern: str = "unstructured"
    compare: str = "row"
    store: str = "dense"
    samples: int = 128

    def __post_init__(self) -> None:
        check_options(self.sparsity, self.pattern, self.compare, self.store)
        within("samples", self.samples, 1)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.pattern)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        score = linear.weight.detach().float().abs() * Inputs.of(inputs).square_sum.sqrt()
        return pruned(linear, lowest(score, self.sparsity, self.pattern, self.compare), self.store)
