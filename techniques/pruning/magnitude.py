"""Magnitude pruning: the smallest weights of each matrix become zero.

The zeros are stored like any other weight, so nothing gets smaller or faster: the row shows full size beside the
promise. It is the baseline that every other criterion has to beat.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import one_of, within


@dataclass(frozen=True)
class Magnitude(LayerTechnique):
    """Zero the weights of least absolute value in a whole matrix, or in each group of a pattern.

    sparsity: share of weights that become zero; with a pattern it is the pattern's own.
    pattern: "unstructured", or "2:4" / "4:8" for so many zeros in each run of so many inputs.
    """

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    needs_inputs: ClassVar[bool] = False

    sparsity: float = 0.5
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        within("sparsity", self.sparsity, 0, 1)
        one_of("pattern", self.pattern, ("unstructured", "2:4", "4:8"))

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        if self.pattern != "unstructured":
            run = int(self.pattern.partition(":")[2])
            if linear.in_features % run:
                return f"its {linear.in_features} inputs do not divide into runs of {run}"
        return None

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        weight = linear.weight.data
        score = weight.abs().float()
        if self.pattern == "unstructured":
            # one more than the share says: the released code also zeroes the weight at the threshold itself
            count = int(score.numel() * self.sparsity) + 1 if self.sparsity else 0
            lowest = score.flatten().argsort(stable=True)[:count]
            mask = torch.zeros(score.numel(), dtype=torch.bool, device=weight.device)
            mask[lowest] = True
            mask = mask.view_as(weight)
        else:
            zeros, run = (int(part) for part in self.pattern.split(":"))
            groups = score.unflatten(1, (-1, run))
            lowest = groups.argsort(dim=-1, stable=True)[..., :zeros]
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).flatten(1)
        linear.weight.data = weight.masked_fill(mask, 0)
        return linear
