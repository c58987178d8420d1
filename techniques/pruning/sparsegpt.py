"""SparseGPT: weights are removed column after column, and those that are left make up for the error.

What to remove is decided anew for each block of columns, by weights that earlier columns have already changed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import within
from effbench.toolbox.compensation import inverse_factor
from effbench.toolbox.sparse import check_options, lowest, misfit, numbers, pruned


@dataclass(frozen=True)
class SparseGPT(LayerTechnique):
    """Zero the weights whose loss can best be made up for by later inputs of their row, and make up for it.

    sparsity: share of weights that become zero, in each block of columns; a pattern has its own.
    pattern: "unstructured", or "2:4" / "4:8" for so many zeros in each run of so many inputs.
    compare: "matrix" to compare over all rows of a block of columns, "row" within each row of it.
    store: "dense" keeps the zeros, so nothing gets smaller; "bitmask", "csr" and, for that pattern, "2:4" store only
        the other weights and their places.
    block_size: columns of a block.
    damping: share of the mean squared input that is added to all of them.
    samples: how many calibration sequences are read.
    """

    paper: ClassVar[str] = "Frantar and Alistarh 2023, arXiv:2301.00774"
    statistics: ClassVar[tuple[str, ...]] = ("gram",)

    sparsity: float = 0.5
    pattern: str = "unstructured"
    compare: str = "matrix"
    store: str = "dense"
    block_size: int = 128
    damping: float = 0.01
    samples: int = 128

    def __post_init__(self) -> None:
        check_options(self.sparsity, self.pattern, self.compare, self.store)
        within("samples", self.samples, 1)
        within("block_size", self.block_size, 1)
        within("damping", self.damping, 0)
        if self.pattern != "unstructured" and self.block_size % numbers(self.pattern)[1]:
            raise ValueError(f"block_size must hold whole runs of pattern={self.pattern}, got {self.block_size}")

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.pattern)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        gram = Inputs.of(inputs).gram
        weight = linear.weight.detach().float().masked_fill(gram.diagonal() == 0, 0)
        factor = inverse_factor(gram, self.damping)
        gone = torch.zeros_like(weight, dtype=torch.bool)
        for start in range(0, weight.shape[1], self.block_size):
            some = slice(start, start + self.block_size)
            rest = slice(start + self.block_size, None)
            errors = self._prune(weight[:, some], factor[some, some], gone[:, some])
            weight[:, rest] -= errors @ factor[some, rest]
        linear.weight.data = weight.to(linear.weight.dtype)
        return pruned(linear, gone, self.store)

    def _prune(self, weight: Tensor, factor: Tensor, gone: Tensor) -> Tensor:
        """Go through the columns of one block: mark in `gone` what is removed, and change the later columns.

        All are parts of the matrix (out, columns), but for `factor` (columns, columns). The errors (out, columns) are
        returned, in units of the factor's diagonal.
        """
        scale = factor.diagonal()
        run = weight.shape[1]
        if self.pattern != "unstructured":
            run = numbers(self.pattern)[1]
        errors = torch.zeros_like(weight)
        for column in range(weight.shape[1]):
            if column % run == 0:
                ahead = slice(column, column + run)
                loss = (weight[:, ahead] / scale[ahead]).square()
                gone[:, ahead] = lowest(loss, self.sparsity, self.pattern, self.compare)
            error = weight[:, column].masked_fill(~gone[:, column], 0) / scale[column]
            weight[:, column + 1 :] -= error.outer(factor[column, column + 1 :])
            errors[:, column] = error
        return errors
