"""FWSVD: each input counts by the gradients of its weights when singular values are cut off.

The whole loss is looked at, not a layer's output, but one number stands for all weights of an input, so that the
problem stays a singular value decomposition. Inputs that go together are taken for independent: what it minimises is
always less than with plain `svd`, the loss need not be (results/pruning has both, a kind of matrix at a time).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.checks import within
from effbench.toolbox.fisher import input_importance
from effbench.toolbox.low_rank import Directions, rank_for, too_thin
from effbench.toolbox.walk import walk


@dataclass(frozen=True)
class FisherWeightedSVD(LayerTechnique):
    """Keep the largest singular values of each matrix with its inputs weighted, and store it as two factors.

    keep: share of a matrix's parameters that the two factors may hold together.
    samples: sequences of calibration text, each as long as the model's context, at most 2048 tokens.
    """

    paper: ClassVar[str] = "Hsu et al. 2022, arXiv:2207.00112"

    keep: float = 0.8
    samples: int = 256

    def __post_init__(self) -> None:
        within("keep", self.keep, 0, 1)
        within("samples", self.samples, 1)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return too_thin(linear, self.keep)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        """As every `layer`, but `inputs` is the Fisher information of the matrix's inputs, (in,)."""
        if not isinstance(inputs, Tensor) or inputs.shape != linear.weight.shape[1:]:
            raise ValueError(f"fwsvd needs the Fisher information of {linear.in_features} inputs in place of inputs")
        scaled = linear.weight.detach().float() * inputs.sqrt()
        return Directions.of(scaled).factors(linear, rank_for(*linear.weight.shape, self.keep))

    def apply(self, system: System, data: Data) -> System:
        found = input_importance(system.model, data.calibration(**self.calibration_size(system)))
        for block in walk(system.model, None):
            for name in block.matrices():
                importance = found.get(f"{block.name}.{name}")
                if importance is not None:  # else an expert that this text never called
                    block.replace(name, lambda linear, _, known=importance: self.layer(linear, known), None)
        return system
