"""LoSparse: two thin factors and a few whole rows of what they miss, chosen while the model is trained on.

At first all rows are there, and the model is what it was. Then the rows that matter least to the loss become zero,
more and more of them, while everything else learns to do without them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from effbench.technique import Data, System, Technique
from effbench.toolbox.checks import within
from effbench.toolbox.low_rank import Directions
from effbench.toolbox.low_rank_rows import LowRankRowsLinear, RowImportance, most_important
from effbench.toolbox.training import Recipe, check_training, next_token_loss, train
from effbench.toolbox.walk import blocks, matrices, replace_module

EVERY = 10
"""Rows are chosen anew after so many steps, and at each of the last ones."""
FIRST, LAST = 0.05, 0.75
"""The shares of the training between which rows go; before and after, it trains with all and with those that stay."""


@dataclass(frozen=True)
class LoSparse(Technique):
    """Replace each matrix by two factors and the rows of the rest that matter most in all matrices, and train on.

    keep: share of the matrices' parameters that factors and rows may hold together.
    low_rank: the factors' part of it, rounded up to a whole rank.
    beta: how much of a row's importance stays from one window of steps to the next.
    steps: of training.
    batch_size, length: sequences in a step, and tokens in each.
    lr: the highest learning rate, of AdamW.
    seed: of the order in which text is read.
    """

    paper: ClassVar[str] = "Li et al. 2023, arXiv:2306.11222"

    keep: float = 0.15
    low_rank: float = 0.05
    beta: float = 0.85
    steps: int = 300
    batch_size: int = 4
    length: int = 256
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        within("keep", self.keep, 0, 1)
        within("low_rank", self.low_rank, 0, 1, open_ends=True)
        within("beta", self.beta, 0, 1)
        check_training(self.steps, self.batch_size, self.length, self.lr)
        if self.low_rank > self.keep:
            raise ValueError(f"low_rank must be at most keep, its part of which is for rows, got {self.low_rank}")

    def unfit(self, system: System) -> str | None:
        found = matrices(system.model)
        if not found:
            return "no plain weight matrix is left to compress: put this technique before the one that packs them"
        if self._rows_budget(found) < 0:
            return f"keep={self.keep:g} of its parameters is less than one rank of each matrix; raise keep"
        return None

    def _rows_budget(self, found: list[tuple[str, nn.Linear]]) -> int:
        """How many weights are left for rows."""
        factors = sum(self._rank(linear) * sum(linear.weight.shape) for _, linear in found)
        return int(self.keep * sum(linear.weight.numel() for _, linear in found)) - factors

    def _rank(self, linear: nn.Linear) -> int:
        rows, columns = linear.weight.shape
        return -int(-self.low_rank * rows * columns // (rows + columns))

    def apply(self, system: System, data: Data) -> System:
        model, found = system.model, matrices(system.model)
        budget, total = self._rows_budget(found), sum(linear.weight.numel() for _, linear in found)
        widths = [linear.in_features for _, linear in found]
        layers: list[Any] = []
        for name, linear in found:
            factors = Directions.of(linear.weight.detach().float()).factors(linear, self._rank(linear))
            layers.append(LowRankRowsLinear.whole(factors, linear.weight))
            replace_module(model, name, layers[-1])
        names = [name for name, _ in found]
        del found, linear
        importance = RowImportance([layer.rows.weight for layer in layers], self.beta, EVERY)
        chosen = [torch.ones(layer.out_features, dtype=torch.bool, device=system.device) for layer in layers]

        def choose(step: int, _: float) -> None:
            importance.step()
            done = (step + 1) / self.steps
            if done < LAST and ((step + 1) % EVERY or done <= FIRST):
                return
            left = max(0.0, 1 - (done - FIRST) / (LAST - FIRST)) ** 3
            chosen[:] = most_important(importance.smoothed, widths, int(budget + (total - budget) * left))
            for layer, stays in zip(layers, chosen, strict=True):
                layer.rows.weight.data[~stays] = 0

        batches = data.batches(self.steps, self.batch_size, self.length, seed=self.seed)
        weights = list(blocks(model)[1].parameters())
        train(model, batches, next_token_loss, Recipe(self.steps, self.lr), parameters=weights, progress=choose)
        importance.close()
        for name, layer, stays in zip(names, layers, chosen, strict=True):
            replace_module(model, name, layer.only(stays))
        return system
