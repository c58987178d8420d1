"""A weight matrix as the product of two thin ones."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from effbench.toolbox.stored import StoredModule


class LowRankLinear(StoredModule):
    """A linear layer of a given rank: `first` (rank, in), then `second` (out, rank) with the bias.

    Both are plain `nn.Linear`, so that a technique that comes later can treat each as a matrix of its own.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__(in_features=in_features, out_features=out_features, rank=rank, bias=bias)
        self.first: nn.Module = nn.Linear(in_features, rank, bias=False)
        self.second: nn.Module = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def of(cls, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Self:
        """The layer that computes with factors `first` (rank, in) and `second` (out, rank)."""
        with torch.device("meta"):
            module = cls(first.shape[1], second.shape[0], first.shape[0], bias is not None)
        module.first.weight = nn.Parameter(first.contiguous())
        module.second.weight = nn.Parameter(second.contiguous())
        if bias is not None:
            module.second.bias = nn.Parameter(bias.detach().clone())
        return module

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.second(self.first(x))
        return product


def rank_for(out_features: int, in_features: int, keep: float) -> int:
    """The largest rank at which both factors together hold at most a share `keep` of the matrix's parameters."""
    return int(out_features * in_features * keep / (out_features + in_features))
