"""Products with 2:4 matrices on GPUs: torch's semi-structured tensors, in the layout of CUTLASS's kernel.

It stores the same two values of each run of four, and the same two bits for each place in another order.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 32, 64
"""The kernel's matrices have multiples of these, in half precision."""
CAPABILITY = (8, 0)
"""The first GPUs with sparse tensor cores."""


def fits(weight: Tensor) -> bool:
    """Whether the kernel is there for a matrix (out, in) of this shape and dtype, where it lies."""
    return (
        weight.is_cuda
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[0] % ROWS == 0
        and weight.shape[1] % COLUMNS == 0
        and torch.cuda.get_device_capability(weight.device) >= CAPABILITY
    )


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values (kept,) of a 2:4 matrix (out, in) and, as bytes, the kernel's description of their places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these tensors a prototype
        packed: Any = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight.contiguous())
    return packed.packed.flatten(), packed.meta.contiguous().view(torch.uint8).flatten()


def matrix(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Any:
    """The semi-structured tensor over what `pack` made of a matrix of that shape; nothing is copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse.SparseSemiStructuredTensorCUTLASS(
            torch.Size(shape),
            packed=values.view(shape[0], -1),
            meta=places.view(torch.int16).view(shape[0], -1),
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )


def takes(x: Tensor, values: Tensor) -> bool:
    """Whether the kernel multiplies inputs `x` (..., in) with such values: of their dtype, on a GPU, no gradient."""
    trained = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and x.dtype == values.dtype and x.numel() > 0 and not trained
