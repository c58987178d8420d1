"""A weight matrix as the product of two thin ones.

Every method here keeps the rank-k part of W S for some square S that says which inputs matter: nothing, their size,
their gradients, their covariance. The best rank-k part of W S is U U^T W S with the first k left singular vectors U of
W S, so that W becomes U U^T W. S is never inverted, and may be singular.

Bits stored for each weight of an m x n matrix at rank k, bias left out: 16 k (m + n) / (m n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
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


def too_thin(linear: nn.Linear, keep: float) -> str | None:
    """Why `keep` leaves nothing of `linear`; `None` if it does."""
    rows, columns = linear.weight.shape
    if rank_for(rows, columns, keep) < 1:
        return f"keep={keep:g} of its {rows} x {columns} parameters is less than one rank"
    return None


@dataclass(frozen=True)
class Directions:
    """The output directions of a matrix in falling order of what they carry.

    vectors: orthonormal, (out, r).
    values: the singular values of W S that belong to them, (r,): what is lost without one, where S is the square root
        of the inputs' Gram matrix, is its square.
    """

    vectors: Tensor
    values: Tensor

    @classmethod
    def of(cls, scaled: Tensor) -> Self:
        """The left singular vectors of W S (out, any).

        Raises `UnfitError` where it is not finite.
        """
        if not bool(scaled.isfinite().all()):
            raise UnfitError("its weights, or what was seen of their inputs, are not all finite, so it has no rank")
        vectors, values, _ = torch.linalg.svd(scaled, full_matrices=False)
        return cls(vectors, values)

    def first(self, count: int) -> Self:
        """A copy of the first `count` of them in float32."""
        return type(self)(self.vectors[:, :count].float().contiguous(), self.values[:count].float())

    def factors(self, linear: nn.Linear, rank: int) -> LowRankLinear:
        """`linear` with its outputs kept to the first `rank` directions, as two factors of its own dtype.

        The root of each value goes to either side, which makes both factors alike in size.
        """
        weight = linear.weight.detach()
        vectors, values = self.vectors[:, :rank], self.values[:rank]
        # a direction that carries nothing has no size to share out
        root = torch.where(values > 1e-7 * self.values[0], values, 1).sqrt()
        first = (vectors / root).T @ weight.to(vectors.dtype)
        return LowRankLinear.of(first.to(weight.dtype), (vectors * root).to(weight.dtype), linear.bias)


def root_of(gram: Tensor) -> Tensor:
    """S with S S^T = `gram` (in, in), in float64, by its eigenvectors: unlike Cholesky's it needs no full rank."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


def refit(layer: LowRankLinear, weight: Tensor, gram: Tensor) -> None:
    """Make the second factor the one with which outputs differ least from those of `weight` (out, in).

    `gram` (in, in) is that of the inputs, which need not be those that the factors were made for. Least squares, by
    normal equations in float64; where no input reaches, the second factor stays as it is.
    """
    factors: Any = layer
    first, second = factors.first.weight.detach().double(), factors.second.weight.detach().double()
    through = first @ gram.double()
    error = through @ (weight.detach().double() - second @ first).T
    step = torch.linalg.pinv(through @ first.T, hermitian=True, rtol=1e-7) @ error
    factors.second.weight.data = (second + step.T).to(factors.second.weight.dtype)


def ranks_by_loss(found: Mapping[str, Directions], shapes: Mapping[str, torch.Size], keep: float) -> dict[str, int]:
    """The ranks with which all matrices lose least together, at a share `keep` of their parameters together.

    Parameters go to the direction that carries most for each of them, wherever it is; none is left without one. A
    matrix that gets all directions of `found` is to stay as it is, and is charged so.
    """
    budget = int(keep * sum(prod(shapes[name]) for name in found))
    gains = [
        (gain if place else torch.inf, name)
        for name, directions in found.items()
        for place, gain in enumerate((directions.values.square() / sum(shapes[name])).tolist())
    ]
    ranks = dict.fromkeys(found, 0)
    for _, name in sorted(gains, reverse=True):
        each, last = sum(shapes[name]), 1 < len(found[name].values) == ranks[name] + 1
        cost = prod(shapes[name]) - ranks[name] * each if last else each
        if cost <= budget:
            budget -= cost
            ranks[name] += 1
    return ranks
