"""A weight matrix as the product of two thin ones plus whole rows of what they miss, and how such rows are chosen.

Bits stored for each weight of an m x n matrix at rank k with r rows, bias left out:
16 (k (m + n) / (m n) + r / m) + 1 / n, the last for a bit for each row that says whether it is there.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.low_rank import LowRankLinear


class LowRankRowsLinear(LowRankLinear):
    """A low-rank layer and beside it `rows` (kept, in): rows that are added to those outputs that `places` names.

    All three matrices are plain `nn.Linear`, so that a technique that comes later can treat each as one of its own.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, kept: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, rank, bias)
        self.options["kept"] = kept
        self.out_features = out_features
        self.rows: nn.Module = nn.Linear(in_features, kept, bias=False)
        self.places: Tensor = nn.Buffer(torch.empty(packed_bytes(out_features, 1), dtype=torch.uint8))

    @classmethod
    def around(cls, factors: LowRankLinear, rows: Tensor, chosen: Tensor) -> Self:
        """The layer with the factors of `factors` and with `rows` (kept, in) at the outputs `chosen` (out,) says."""
        options = {name: factors.options[name] for name in ("in_features", "out_features", "rank", "bias")}
        with torch.device("meta"):
            module = cls(**options, kept=len(rows))
        module.first, module.second = factors.first, factors.second
        module.rows.weight = nn.Parameter(rows.contiguous())
        module.places = pack(chosen.byte(), 1)
        return module

    @classmethod
    def whole(cls, factors: LowRankLinear, weight: Tensor) -> Self:
        """The layer that computes with `weight` (out, in): the factors and all rows of what they miss."""
        parts: Any = factors
        missed = weight.detach().float() - parts.second.weight.detach().float() @ parts.first.weight.detach().float()
        return cls.around(factors, missed.to(weight.dtype), torch.ones(len(weight), device=weight.device))

    def only(self, chosen: Tensor) -> LowRankLinear:
        """The layer with no rows but those that `chosen` (out,) says; all rows must still be here."""
        parts: Any = self
        if not bool(chosen.any()):
            return LowRankLinear.of(parts.first.weight.data, parts.second.weight.data, parts.second.bias)
        return type(self).around(self, parts.rows.weight.data[chosen], chosen)

    def forward(self, x: Tensor) -> Tensor:
        product = super().forward(x)
        outputs = unpack(self.places, self.out_features, 1).nonzero().flatten()
        return product.index_add(-1, outputs, self.rows(x))


class RowImportance:
    """How much the loss would change without each row of some matrices, smoothed over the steps of a training.

    A row's sensitivity is the mean of |w dL/dw|. It is averaged over windows of `window` steps, and the windows by an
    exponential mean that forgets with `beta`. Source: LoSparse (arXiv:2306.11222), section 3.2, as released: without
    the factor for uncertainty, which the released scripts switch off.
    """

    def __init__(self, weights: list[nn.Parameter], beta: float, window: int) -> None:
        self._beta, self._window, self._step = beta, window, 0
        self._now: dict[int, Tensor] = {}
        self._mean: list[Tensor] = [torch.zeros(len(weight), device=weight.device) for weight in weights]
        self.smoothed: list[Tensor] = []
        """For each matrix the importance of its rows (out,)."""
        self._hooks = [
            weight.register_post_accumulate_grad_hook(lambda w, place=place: self._look(w, place))
            for place, weight in enumerate(weights)
        ]

    def _look(self, weight: Tensor, place: int) -> None:
        assert weight.grad is not None
        self._now[place] = (weight.detach() * weight.grad).abs().float().mean(1)

    def step(self) -> None:
        """Take in the gradients of one more step."""
        seen = self._step % self._window
        for place, sensitivity in self._now.items():
            self._mean[place] = (self._mean[place] * seen + sensitivity) / (seen + 1)
        self._step += 1
        if self._step < self._window:
            self.smoothed = [mean.clone() for mean in self._mean]  # no window is full, so there is nothing to smooth
        elif seen + 1 == self._window:
            before = self.smoothed if self._step > self._window else [torch.zeros_like(mean) for mean in self._mean]
            self.smoothed = [
                self._beta * old + (1 - self._beta) * mean for old, mean in zip(before, self._mean, strict=True)
            ]

    def close(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()


def most_important(importance: list[Tensor], widths: list[int], budget: int) -> list[Tensor]:
    """Which rows (out,) of each matrix stay: the most important of all matrices, together at most `budget` weights."""
    scores = torch.cat(importance)
    order = scores.argsort(descending=True, stable=True)
    cost = torch.cat([torch.full_like(rows, width) for rows, width in zip(importance, widths, strict=True)]).double()
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[order[cost[order].cumsum(0) <= budget]] = True
    return list(chosen.split([len(rows) for rows in importance]))
