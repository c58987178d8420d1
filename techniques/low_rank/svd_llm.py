"""SVD-LLM: singular values of the whitened matrix, so that what is cut off is exactly what the outputs lose.

With S the square root of the Gram matrix of a matrix's inputs, the error of its outputs after keeping k singular
values of W S is the sum of the squares of the others. No other matrix of rank k has less on these inputs.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.low_rank import Directions, rank_for, ranks_by_loss, refit, root_of, too_thin
from effbench.toolbox.walk import as_linear, matrices, walk


@dataclass(frozen=True)
class SVDLLM(LayerTechnique):
    """Keep the output directions that carry the most on calibration text and store each matrix as two factors.

    keep: share of a matrix's parameters that the two factors may hold together.
    allocation: "uniform" keeps this share of every matrix, "loss" of all together, spent where outputs lose most.
    update: fit the second factor anew to the inputs that come out of the compressed blocks before it.
    samples: sequences of calibration text, each as long as the model's context, at most 2048 tokens.
    """

    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2403.07378; allocation by loss after arXiv:2503.12340"
    dense_inputs: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("gram",)

    keep: float = 0.8
    allocation: str = "uniform"
    update: bool = False
    samples: int = 256

    def __post_init__(self) -> None:
        within("keep", self.keep, 0, 1)
        one_of("allocation", self.allocation, ("uniform", "loss"))
        within("samples", self.samples, 1)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return too_thin(linear, self.keep)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return _directions(linear, Inputs.of(inputs)).factors(linear, rank_for(*linear.weight.shape, self.keep))

    def apply(self, system: System, data: Data) -> System:
        if self.allocation == "uniform" and not self.update:
            return super().apply(system, data)
        ids = data.calibration(**self.calibration_size(system))
        found: dict[str, Directions] = {}
        for block in walk(system.model, ids):
            for name, inputs in block.inputs(block.matrices(), self.statistics, advance=True).items():
                linear = as_linear(block.module.get_submodule(name))
                most = rank_for(*linear.weight.shape, 1)  # with more, the factors would take more than the matrix
                found[f"{block.name}.{name}"] = _directions(linear, inputs).first(most)
        shapes = {name: linear.weight.shape for name, linear in matrices(system.model) if name in found}
        ranks = {name: rank_for(*shape, self.keep) for name, shape in shapes.items()}
        if self.allocation == "loss":
            ranks = ranks_by_loss(found, shapes, self.keep)
        for block in walk(system.model, ids if self.update else None):
            names = [name for name in block.matrices() if f"{block.name}.{name}" in found]
            seen = block.inputs(names, self.statistics) if self.update else {}
            for name in names:
                full = f"{block.name}.{name}"
                directions = found.pop(full)
                if ranks[full] < len(directions.values):  # else the factors would save nothing: it stays as it is
                    block.replace(name, partial(_factors, directions, ranks[full]), seen.get(name))
        return system


def _directions(linear: nn.Linear, inputs: Inputs) -> Directions:
    return Directions.of(linear.weight.detach().double() @ root_of(inputs.gram))


def _factors(directions: Directions, rank: int, linear: nn.Linear, inputs: Inputs | None) -> nn.Module:
    layer = directions.factors(linear, rank)
    if inputs is not None:
        refit(layer, linear.weight, inputs.gram)
    return layer
