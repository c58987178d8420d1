"""Recovering what pruning lost: low-rank additions to all matrices are trained on text and then merged into them.

The model keeps its size and its shape: `llm_pruner+recover` is LLM-Pruner's whole recipe.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from effbench.technique import Data, System, Technique
from effbench.toolbox.checks import within
from effbench.toolbox.training import Recipe, check_training, next_token_loss, train
from effbench.toolbox.walk import blocks, matrices, matrix_names, replace_module


class Addition(nn.Module):
    """What is added to a weight (out, in): alpha / rank times the product of two thin matrices, at first nothing."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = weight.shape[1] ** -0.5
        first = (torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1) * bound
        self.first = nn.Parameter(first.to(weight.device))
        self.second = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` with its addition; its zeros, which are those of a pruned matrix, stay."""
        return weight + self.scale * (self.second @ self.first) * (weight != 0)


class Adapted(nn.Module):
    """A matrix that computes with its weight and an addition, which equal weights of several blocks share."""

    def __init__(self, inner: Any, addition: Addition) -> None:
        super().__init__()
        self.inner, self.addition = inner, addition

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        weight = weight.T if isinstance(self.inner, Conv1D) else weight
        return functional.linear(x, self.addition(weight), self.inner.bias)


@dataclass(frozen=True)
class Recover(Technique):
    """Train low-rank additions (LoRA) to the matrices of the blocks, and merge them.

    rank: of each addition.
    alpha: additions are scaled by alpha / rank.
    steps: of training, with AdamW.
    batch_size, length: sequences in a step, and tokens in each.
    lr: the highest learning rate; models of billions of weights want a tenth of the default or less.
    seed: of the additions and of the order in which text is read.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685; as in Ma et al. 2023, arXiv:2305.11627"

    rank: int = 32
    alpha: float = 64.0
    steps: int = 300
    batch_size: int = 4
    length: int = 256
    lr: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        within("rank", self.rank, 1)
        within("alpha", self.alpha, 0, open_ends=True)
        check_training(self.steps, self.batch_size, self.length, self.lr)

    def unfit(self, system: System) -> str | None:
        if not matrices(system.model):
            return "no plain weight matrix is left to train: put this technique before the one that packs them"
        return None

    def apply(self, system: System, data: Data) -> System:
        model, layers = system.model, blocks(system.model)[1]
        generator = torch.Generator().manual_seed(self.seed)
        additions: dict[int, Addition] = {}
        adapted: dict[str, Adapted] = {}
        for name, module in [(name, layers.get_submodule(name)) for name in matrix_names(layers)]:
            weight: Any = module.weight
            if id(weight) not in additions:
                seen = weight.T if isinstance(module, Conv1D) else weight
                additions[id(weight)] = Addition(seen, self.rank, self.alpha, generator)
            adapted[name] = Adapted(module, additions[id(weight)])
            replace_module(layers, name, adapted[name])
        trained = [parameter for addition in additions.values() for parameter in addition.parameters()]
        batches = data.batches(self.steps, self.batch_size, self.length, seed=self.seed)
        train(model, batches, next_token_loss, Recipe(self.steps, self.lr), parameters=trained)
        with torch.no_grad():
            for name, module in adapted.items():
                replace_module(layers, name, module.inner)
                weight = module.inner.weight
                merge = additions.pop(id(weight), None)
                if merge is not None:
                    flat = weight.data.T if isinstance(module.inner, Conv1D) else weight.data
                    flat.copy_(merge(flat.float()))
        return system
