"""Products of a few bfloat16 rows with int8 or int4 codes on a CPU, by ATen's kernels or the compiled one.

They are made for decoding. With many rows it is faster to unpack the codes once and let a plain matrix product do the
rest; with other dtypes the kernels exist but are 10 to 50 times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effbench.toolbox.kernels import compiled

INT8_ROWS = 48
"""Up to so many rows ATen's int8 kernel beats unpacking (2048 x 2048, one thread with AVX-512)."""
INT4_ROWS = 90
"""The same for ATen's int4 kernel."""
INT8_WIDTH = 16
"""The int8 kernel reads inputs by so many: with a width that is no multiple it reads past the end, or crashes."""
ALIGNMENT = 64
"""The int8 kernel crashes on tensors that start elsewhere than at a multiple of 16 (codes) or 32 bytes (inputs)."""
INT4_GROUPS = (256, 128, 64, 32)
"""Group widths that the int4 kernel knows."""


def takes(x: Tensor, most_rows: int) -> bool:
    """Whether a kernel is of use for `x` (..., in): few bfloat16 rows on a CPU, with no gradient to pass on."""
    rows = x.numel() // x.shape[-1]
    trained = torch.is_grad_enabled() and x.requires_grad
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < rows <= most_rows and not trained


def int8_rows(codes: Tensor) -> int:
    """Up to how many rows a kernel beats unpacking int8 `codes` (out, in); 0 if there is none that can read them."""
    if (kernel := compiled.kernel()) and kernel.vectors:
        return compiled.INT8_ROWS
    readable = codes.shape[1] % INT8_WIDTH == 0 and codes.data_ptr() % ALIGNMENT == 0
    return INT8_ROWS if readable else 0


def int8_product(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`x` (rows, in) times the transpose of scales * (codes - zeros), in bfloat16.

    `codes` (out, in) are int8. `scales` and `zeros` (out,) are float32 and applied to the sums of ATen's kernel, since
    that knows no zero points and would take scales in bfloat16 only.
    """
    if (kernel := compiled.kernel()) and kernel.vectors:
        return kernel.int8_product(x, codes, scales, zeros)
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    sums = torch._weight_int8pack_mm(x, codes, x.new_ones(codes.shape[0])).float()
    return ((sums - x.float().sum(-1, keepdim=True) * zeros) * scales).to(x.dtype)


def int4_product(x: Tensor, packed: Tensor, scales_zeros: Tensor) -> Tensor:
    """`x` (rows, in) times the transpose of (codes - 8) * scale + zero, in bfloat16.

    `packed` are the codes as `pack_tiles` lays them out for this machine; `scales_zeros` (groups, out, 2) are
    bfloat16 and repeated where a group is wider than the kernel knows.
    """
    groups, out_features, _ = scales_zeros.shape
    width = x.shape[1] // groups
    known = next(size for size in INT4_GROUPS if width % size == 0)
    if known != width:
        scales_zeros = scales_zeros.repeat_interleave(width // known, 0)
    codes = packed.view(out_features, -1)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, known, scales_zeros)
    return product
