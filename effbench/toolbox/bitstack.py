"""A weight matrix as a stack of blocks, each the signs of what is still missing times a low-rank matrix of its sizes.

The first t blocks of a stack are the stack of t blocks: a model is made smaller by dropping blocks from the top.

Bits stored for each weight of an m x n matrix with t blocks of rank k, bias left out: t (1 + 16 k (m + n) / (m n)).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.toolbox.checks import one_of
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.stored import StoredModule


class BitStackLinear(StoredModule):
    """A linear layer over `blocks` blocks of `rank`: weight = sum of signs * (left @ right).

    factor_dtype: of left (out, rank) and right (rank, in): "float16" or "float32".
    bias, dtype: whether there is a bias, and its type.

    The weight is put together for each product and dropped after it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        blocks: int,
        factor_dtype: str = "float16",
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        one_of("factor_dtype", factor_dtype, ("float16", "float32"))
        super().__init__(
            in_features=in_features,
            out_features=out_features,
            rank=rank,
            blocks=blocks,
            factor_dtype=factor_dtype,
            bias=bias,
            dtype=dtype,
        )
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        signs, factors = packed_bytes(out_features * in_features, 1), getattr(torch, factor_dtype)
        self.signs: Tensor = nn.Buffer(torch.empty(blocks, signs, dtype=torch.uint8))
        self.left: Tensor = nn.Buffer(torch.empty(blocks, out_features, rank, dtype=factors))
        self.right: Tensor = nn.Buffer(torch.empty(blocks, rank, in_features, dtype=factors))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def stack(
        cls, linear: nn.Linear, rank: int, blocks: int, scales: Tensor | None = None, factor_dtype: str = "float16"
    ) -> Self:
        """The stack for `linear`; errors at inputs with large `scales` (in,) are the ones that count.

        The weight is multiplied by the scales before, each right factor divided by them after, which no sign notices:
        so they are not stored. Blocks are made from what the exact factors before them have left.
        Raises `UnfitError` where a factor is not finite in the dtype in which it is to be stored.
        """
        weight = linear.weight.detach().float()
        scales = torch.ones_like(weight[0]) if scales is None else scales.float()
        rank = min(rank, *weight.shape)
        missing, signs, left, right = weight * scales, [], [], []
        for _ in range(blocks):
            positive = missing >= 0
            u, values, v = torch.linalg.svd(missing.abs(), full_matrices=False)
            root = values[:rank].sqrt()
            a, b = u[:, :rank] * root, root[:, None] * v[:rank]
            missing = missing - torch.where(positive, 1.0, -1.0) * (a @ b)
            signs.append(pack(positive.byte(), 1))
            left.append(a.to(getattr(torch, factor_dtype)))
            right.append((b / scales).to(getattr(torch, factor_dtype)))
        bias = linear.bias
        dtype = str(weight.dtype if bias is None else bias.dtype).removeprefix("torch.")
        with torch.device("meta"):
            module = cls(weight.shape[1], weight.shape[0], rank, blocks, factor_dtype, bias is not None, dtype)
        module.signs, module.left, module.right = torch.stack(signs), torch.stack(left), torch.stack(right)
        if bias is not None:
            module.bias = bias.detach().clone()
        if not bool(module.left.isfinite().all() and module.right.isfinite().all()):
            raise UnfitError("a factor is not finite: the weights are not, or factor_dtype=float32 is needed")
        return module

    def first(self, blocks: int) -> Self:
        """The first `blocks` blocks as a layer of its own that shares nothing with this one."""
        with torch.device("meta"):
            module = type(self)(**{**self.options, "blocks": blocks})
        for name, tensor in self.named_buffers():
            setattr(module, name, (tensor if name == "bias" else tensor[:blocks]).clone())
        return module

    def weight_of(self, blocks: int) -> Tensor:
        """The weight matrix (out, in) that the first `blocks` blocks stand for, in float32, made anew by each call."""
        weight = self.left.new_zeros(self.out_features, self.in_features, dtype=torch.float32)
        for block in range(blocks):
            signs = unpack(self.signs[block], weight.numel(), 1).view_as(weight)
            sizes = self.left[block].float() @ self.right[block].float()
            weight += torch.where(signs.bool(), sizes, -sizes)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight_of(self.blocks).to(x.dtype), bias)


def block_bytes(shape: torch.Size, rank: int, factor_dtype: str) -> int:
    """What one block of a matrix (out, in) takes."""
    size = getattr(torch, factor_dtype).itemsize
    return packed_bytes(shape.numel(), 1) + size * min(rank, *shape) * sum(shape)
