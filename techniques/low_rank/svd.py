"""Plain singular value decomposition: each matrix becomes the product of two thin ones, the best in Frobenius norm.

It looks at weights only, so it spends its rank on directions that no input may ever take: the baseline of all
low-rank techniques that look at activations.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import within
from effbench.toolbox.low_rank import Directions, rank_for, too_thin


@dataclass(frozen=True)
class PlainSVD(LayerTechnique):
    """Keep the largest singular values of each matrix and store it as two factors.

    keep: share of a matrix's parameters that the two factors may hold together; a square matrix keeps keep / 2 of
        its rank.
    """

    paper: ClassVar[str] = "Eckart and Young 1936; the baseline of Wang et al. 2025, arXiv:2403.07378"
    needs_inputs: ClassVar[bool] = False

    keep: float = 0.8

    def __post_init__(self) -> None:
        within("keep", self.keep, 0, 1)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return too_thin(linear, self.keep)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return Directions.of(linear.weight.detach().float()).factors(linear, rank_for(*linear.weight.shape, self.keep))
