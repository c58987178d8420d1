"""ASVD: each input counts by its mean size when singular values are cut off.

A diagonal of sizes knows nothing of inputs that go together: what is cut off is not what the outputs lose, and
`svd_llm` at the same rank always loses less on the same inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import within
from effbench.toolbox.low_rank import Directions, rank_for, too_thin


@dataclass(frozen=True)
class ActivationAwareSVD(LayerTechnique):
    """Keep the largest singular values of each matrix with its inputs scaled, and store it as two factors.

    keep: share of a matrix's parameters that the two factors may hold together.
    alpha: power to which the mean size of an input is raised; 0 is plain `svd`.
    samples: sequences of calibration text, each as long as the model's context, at most 2048 tokens.
    """

    paper: ClassVar[str] = "Yuan et al. 2023, arXiv:2312.05821"
    dense_inputs: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("mean_abs",)

    keep: float = 0.8
    alpha: float = 0.5
    samples: int = 32

    def __post_init__(self) -> None:
        within("keep", self.keep, 0, 1)
        within("alpha", self.alpha, 0)
        within("samples", self.samples, 1)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return too_thin(linear, self.keep)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        sizes = Inputs.of(inputs).mean_abs.pow(self.alpha) + 1e-6
        scaled = linear.weight.detach().float() * sizes
        return Directions.of(scaled).factors(linear, rank_for(*linear.weight.shape, self.keep))
