"""Products with 2:4 matrices on GPUs: torch's semi-structured tensors, in the layout of the kernel that is there.

CUTLASS's kernel is for the first GPUs with sparse tensor cores, cuSPARSELt's for those after them. Both store the same
two values of each run of four, and the same two bits for each place in an order of their own; cuSPARSELt's are one
piece, the places behind the values.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 32, 64
"""The kernels' matrices have multiples of these, in half precision."""
LAYOUTS = ("plain", "cutlass", "cusparselt")
"""The first is none of a kernel's."""


def layout(weight: Tensor) -> str:
    """That of the kernel for a matrix (out, in) of this shape and dtype, where it lies."""
    whole = weight.shape[0] % ROWS == 0 and weight.shape[1] % COLUMNS == 0
    if not (weight.is_cuda and whole and weight.dtype in (torch.float16, torch.bfloat16)):
        return "plain"
    generation, _ = torch.cuda.get_device_capability(weight.device)
    later = "cusparselt" if generation > 8 and torch.backends.cusparselt.is_available() else "plain"
    return "cutlass" if generation == 8 else later


def pack(weight: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """The values and, as bytes, the places of a 2:4 matrix (out, in)."""
    if kernel == "cusparselt":
        packed: Tensor = torch._cslt_compress(weight.contiguous())
        return packed.flatten(), torch.empty(0, dtype=torch.uint8, device=weight.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these tensors a prototype
        tensor: Any = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight.contiguous())
    return tensor.packed.flatten(), tensor.meta.contiguous().view(torch.uint8).flatten()


def matrix(values: Tensor, places: Tensor, shape: tuple[int, int], kernel: str) -> Any:
    """The semi-structured tensor over what `pack` made of a matrix of that shape; nothing is copied."""
    one = kernel == "cusparselt"
    kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT if one else torch.sparse.SparseSemiStructuredTensorCUTLASS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            torch.Size(shape),
            packed=values.view(shape[0], -1),
            meta=None if one else places.view(torch.int16).view(shape[0], -1),
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )


def filled_in(values: Tensor, places: Tensor, shape: tuple[int, int], kernel: str) -> Tensor:
    """The matrix with its zeros."""
    weight: Tensor = matrix(values, places, shape, kernel).to_dense()
    return weight


def takes(x: Tensor, values: Tensor) -> bool:
    """Whether the kernel multiplies inputs `x` (..., in) with such values: of their dtype, on a GPU, no gradient."""
    trained = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and x.dtype == values.dtype and x.numel() > 0 and not trained
