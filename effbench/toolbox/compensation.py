"""Quantizing a matrix column after column, each column's error made up for by those that come later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.errors import UnfitError
from effbench.toolbox.grid import decode, encode, fit_grid


@dataclass(frozen=True)
class Compensation:
    """How columns are quantized (see `gptq` for the options). Source: Frantar et al. 2023, arXiv:2210.17323, section 3.

    dtype: in which scales will be stored.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    block_size: int = 128
    dtype: torch.dtype = torch.float32

    def quantize(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Codes (out, in) of a `weight` (out, in), scales and zero points (out, groups), and the order of the codes.

        `gram` (in, in) is the sum of x x^T over the calibration inputs. The order (in,) says which input each column
        of codes is for; it is `None` where columns stand in their own order. Weights that are zero, such as pruned
        ones, stay zero.
        Raises `UnfitError` where the damped Gram matrix cannot be inverted.
        """
        fixed = self._grids(weight) if self.group_size == 0 else None
        columns = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
        importance = gram.diagonal()
        columns[importance == 0] = 0  # an input that is never used: nothing is lost, and the others need not bear it
        if self.group_size and self.static_groups:
            fixed = self._grids(columns.T)
        order = torch.argsort(importance, descending=True, stable=True) if self.act_order else None
        codes, grids = self._columns(columns, gram, order, fixed, (weight.detach() == 0).T)
        if order is not None and fixed is not None:  # each code finds its grid by its input's own place
            codes, order = codes[torch.argsort(order)], None
        scales, zeros = fixed if fixed is not None else grids
        return codes.T.contiguous(), scales, zeros, order

    def _grids(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.detach().unflatten(1, (-1, self.group_size or weight.shape[1]))
        return fit_grid(groups, self.bits, symmetric=self.symmetric, dtype=self.dtype)

    def _columns(
        self, columns: Tensor, gram: Tensor, order: Tensor | None, fixed: tuple[Tensor, Tensor] | None, gone: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Codes (in, out) in the order of quantizing, and the grids that were fitted on the way if none are fixed.

        `columns` (in, out) is the transposed weight, so that a column lies in one piece; it is used up. `gone`
        (in, out) says which weights stay zero.
        """
        places = torch.arange(len(columns), device=columns.device) if order is None else order
        columns, gone = columns[places], gone[places]
        factor = inverse_factor(gram if order is None else gram[places][:, places], self.damping)
        codes = torch.empty_like(columns, dtype=torch.uint8)
        width = self.group_size or len(columns)
        fitted: list[tuple[Tensor, Tensor]] = []
        groups = (places // width).tolist()
        for start in range(0, len(columns), self.block_size):
            end = min(start + self.block_size, len(columns))
            block, inner = columns[start:end].clone(), factor[start:end, start:end]
            errors = torch.empty_like(block)
            for step in range(end - start):
                place = start + step
                if fixed is not None:
                    scales, zeros = fixed[0][:, groups[place]], fixed[1][:, groups[place]]
                elif place % width == 0:
                    # as released: what this block has not yet passed on to later columns is not seen
                    scales, zeros = fit_grid(
                        columns[place : place + width].T, self.bits, symmetric=self.symmetric, dtype=self.dtype
                    )
                    fitted.append((scales, zeros))
                found = encode(block[step].masked_fill(gone[place], 0).unsqueeze(-1), scales, zeros, self.bits)
                codes[place] = found.squeeze(-1)
                errors[step] = (block[step] - decode(found, scales, zeros).squeeze(-1)) / inner[step, step]
                block[step + 1 :].addr_(inner[step, step + 1 :], errors[step], alpha=-1)
            columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        if fixed is not None:
            return codes, fixed
        return codes, (torch.stack([s for s, _ in fitted], 1), torch.stack([z for _, z in fitted], 1))


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor (in, in) of the inverse of a damped Gram matrix, in float32.

    `damping` is the share of the mean diagonal that is added to it; an input that is never used counts as 1.
    Raises `UnfitError` where there is no inverse.
    """
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped, diagonal  # no more than two of these matrices at a time: of a wide one each takes a quarter of a GB
    if not failed:
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        del inverse
    if failed:
        raise UnfitError(
            f"its calibration inputs do not span enough directions for damping {damping:g}; use more samples or more "
            "damping"
        )
    return upper.float()
