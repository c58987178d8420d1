"""Products with packed codes on a GPU, and codes unpacked there, by kernels that Triton compiles at their first use.

They read codes in the layout of `codes.pack`, in which the rows of a matrix that share a byte lie a part of its height
apart. A program takes such rows together, so that each byte is fetched once for all of its codes.

Importing this needs Triton, which torch brings along where it is built for CUDA.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Up to so many rows the product beats unpacking (4096 x 4096, H100)."""
SINGLE, FEW, UNPACKING = (4, 1024, 4), (16, 256, 4), (8, 1024, 4)
"""Rows and columns that a program takes at a time, and its warps: for one row, for a few, and to unpack."""
NARROW = 32
"""Groups of fewer columns than this, or of no multiple of it, are not worth a kernel."""
ZEROS = {"middle": 0, "codes": 1, "float16": 2, "float32": 2}
"""How the kernels call the ways in which zero points are stored."""


def fits(shape: tuple[int, int], groups: int, bits: int) -> bool:
    """Whether the kernels can read `bits`-bit codes of a matrix (out, in) with so many groups in a row."""
    rows, columns = shape
    return rows % _rows_of_a_byte(bits) == 0 and columns // groups % NARROW == 0 and rows * columns < 2**31


def takes(x: Tensor) -> bool:
    """Whether the product is of use for `x` (..., in): few rows, with no gradient to pass on."""
    trained = torch.is_grad_enabled() and x.requires_grad
    return 0 < x.numel() // x.shape[-1] <= ROWS and not trained


def product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, shape: tuple[int, int], bits: int
) -> Tensor:
    """`x` (rows, in) times the transpose of scales * (codes - zeros) (out, in), in the dtype of `x`.

    `codes` are as `codes.pack` gives them, `scales` (out, groups); `kind` is how `zeros` are stored.
    """
    y = x.new_empty(x.shape[0], shape[0])
    at_once = 1 if x.shape[0] == 1 else 16
    tile = SINGLE if at_once == 1 else FEW
    tall, *wide, base = _cut(shape, scales.shape[1], bits, tile)
    grid = triton.cdiv(base, tall // _rows_of_a_byte(bits)), triton.cdiv(x.shape[0], at_once)
    told = codes, scales, codes if zeros is None else zeros, *shape, scales.shape[1], base
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _product[grid](*told, x, y, x.shape[0], bits, ZEROS[kind], tall, *wide, at_once, num_warps=tile[2])
    return y


def unpacked(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    shape: tuple[int, int],
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """scales * (codes - zeros) (out, in), computed in float32; as for `product`."""
    y = torch.empty(shape, dtype=dtype, device=codes.device)
    tall, *wide, base = _cut(shape, scales.shape[1], bits, UNPACKING)
    grid = triton.cdiv(base, tall // _rows_of_a_byte(bits)), shape[1] // (wide[0] * wide[1])
    told = codes, scales, codes if zeros is None else zeros, *shape, scales.shape[1], base
    with torch.cuda.device(y.device) if y.is_cuda else nullcontext():
        _unpack[grid](*told, y, bits, ZEROS[kind], tall, *wide, num_warps=UNPACKING[2])
    return y


def _rows_of_a_byte(bits: int) -> int:
    return 8 // (bits & -bits)


def _cut(shape: tuple[int, int], groups: int, bits: int, tile: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """How many rows, groups and columns of each are read at a time, and how far apart the rows of a byte lie.

    Columns are a power of two that divides a group; groups are more than one only if all columns of each are read.
    """
    width, (tall, wide, _) = shape[1] // groups, tile
    columns = min(wide, width & -width)
    several = min(wide // columns, groups & -groups) if columns == width else 1
    return max(tall, _rows_of_a_byte(bits)), several, columns, shape[0] // _rows_of_a_byte(bits)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    packed, place, low, turn, count, width, base, there, BITS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """What a part of so many bits adds to the codes; `place` is where the lowest of a byte's rows have theirs."""
    below: tl.constexpr = BITS & (7 ^ (2 * PART - 1))  # the bits of the parts before
    fold: tl.constexpr = PART // (BITS & -BITS)  # this part's bytes hold that much fewer rows
    at = place + count // 8 * below + (turn % fold) * base * width
    byte = tl.load(packed + at, mask=there, other=0).to(tl.int32)
    return ((byte >> (turn // fold * PART)) & ((1 << PART) - 1)) << below


@triton.jit
def _codes(packed, low, turn, column, count, width, base, there, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of the rows low + turn * base, out of `count` codes with `width` in a row; all of one rank."""
    place = low * width + column
    if BITS == 8:
        found = tl.load(packed + place, mask=there, other=0).to(tl.int32) ^ 128
    else:
        found = tl.zeros(place.shape, tl.int32)
        if BITS & 4:
            found |= _part(packed, place, low, turn, count, width, base, there, BITS, 4)
        if BITS & 2:
            found |= _part(packed, place, low, turn, count, width, base, there, BITS, 2)
        if BITS & 1:
            found |= _part(packed, place, low, turn, count, width, base, there, BITS, 1)
    return found


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    codes, scales, zeros, out, width, groups, base, low, turn, first, BITS: tl.constexpr, ZERO: tl.constexpr,
    GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The weights [rows, GROUPS, WIDE] of the rows low + turn * base from column `first` on.

    `low` and `turn` are [rows, 1, 1]. More than one group are whole ones.
    """
    there = low < base
    group = first // (width // groups) + tl.arange(0, GROUPS)[None, :, None]
    grid = (low + turn * base) * groups + group
    scale = tl.load(scales + grid, mask=there, other=0).to(tl.float32)
    if ZERO == 0:
        zero = tl.full(scale.shape, 1 << (BITS - 1), tl.float32)
    elif ZERO == 1:
        zero = _codes(zeros, low, turn, group, out * groups, groups, base, there, BITS).to(tl.float32)
    else:
        zero = tl.load(zeros + grid, mask=there, other=0).to(tl.float32)
    column = first + tl.arange(0, GROUPS)[None, :, None] * WIDE + tl.arange(0, WIDE)[None, None, :]
    found = _codes(codes, low, turn, column, out * width, width, base, there, BITS)
    return (found.to(tl.float32) - zero) * scale


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    codes, scales, zeros, out, width, groups, base, x, y, rows, BITS: tl.constexpr, ZERO: tl.constexpr,
    TALL: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    apart: tl.constexpr = TALL // (8 // (BITS & -BITS))
    low, turn = tl.program_id(0) * apart + tl.arange(0, TALL) % apart, tl.arange(0, TALL) // apart
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, TALL), tl.float32)
    for first in range(0, width, GROUPS * WIDE):
        weights = _weights(
            codes, scales, zeros, out, width, groups, base, low[:, None, None], turn[:, None, None], first, BITS, ZERO,
            GROUPS, WIDE,
        )  # fmt: skip
        weights = tl.reshape(weights, (TALL, GROUPS * WIDE))
        at = row[:, None] * width + first + tl.arange(0, GROUPS * WIDE)[None, :]
        some = tl.load(x + at, mask=(row < rows)[:, None], other=0)
        if ROWS == 1:
            sums += tl.sum(weights * some.to(tl.float32), 1)[None, :]
        else:
            sums = tl.dot(some, tl.trans(weights.to(some.dtype)), sums, input_precision="ieee")
    at = row[:, None] * out + (low + turn * base)[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (low < base)[None, :])


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    codes, scales, zeros, out, width, groups, base, y, BITS: tl.constexpr, ZERO: tl.constexpr,
    TALL: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    apart: tl.constexpr = TALL // (8 // (BITS & -BITS))
    low, turn = tl.program_id(0) * apart + tl.arange(0, TALL) % apart, tl.arange(0, TALL) // apart
    low, turn = low[:, None, None], turn[:, None, None]
    first = tl.program_id(1) * (GROUPS * WIDE)
    weights = _weights(codes, scales, zeros, out, width, groups, base, low, turn, first, BITS, ZERO, GROUPS, WIDE)
    column = first + tl.arange(0, GROUPS)[None, :, None] * WIDE + tl.arange(0, WIDE)[None, None, :]
    there = (low < base) & (column < width)
    tl.store(y + (low + turn * base) * width + column, weights.to(y.dtype.element_ty), mask=there)
