"""Products with packed codes on a GPU, and codes unpacked there, by kernels that Triton compiles at their first use.

They read codes in the layout of `codes.pack`, in which the rows of a matrix that share a byte lie a part of its height
apart. A program takes such rows together, so that each byte is fetched once for all of its codes.

Importing this needs Triton, which torch brings along where it is built for CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Up to so many rows the product beats unpacking (4096 x 4096, H100)."""
TALL, WIDE = 16, 128
"""Rows and columns that a program takes at a time."""
NARROW = 32
"""Fewer columns in a row than this, or no multiple of it, are not worth a kernel."""
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
    at_once = 1 if x.shape[0] == 1 else max(16, min(64, triton.next_power_of_2(x.shape[0])))
    base, wide = _cut(shape, scales.shape[1], bits)
    grid = triton.cdiv(base, TALL // _rows_of_a_byte(bits)), triton.cdiv(x.shape[0], at_once)
    told = codes, scales, codes if zeros is None else zeros, *shape, scales.shape[1], base
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        _product[grid](*told, x, y, x.shape[0], bits, ZEROS[kind], TALL, wide, at_once)
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
    base, wide = _cut(shape, scales.shape[1], bits)
    grid = triton.cdiv(base, TALL // _rows_of_a_byte(bits)), shape[1] // wide
    told = codes, scales, codes if zeros is None else zeros, *shape, scales.shape[1], base
    with torch.cuda.device(y.device) if y.is_cuda else torch.no_grad():
        _unpack[grid](*told, y, bits, ZEROS[kind], TALL, wide)
    return y


def _rows_of_a_byte(bits: int) -> int:
    return 8 // (bits & -bits)


def _cut(shape: tuple[int, int], groups: int, bits: int) -> tuple[int, int]:
    """How far apart the rows of a byte lie, and how many columns are read at a time: none of two groups."""
    width = shape[1] // groups
    return shape[0] // _rows_of_a_byte(bits), min(WIDE, width & -width)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    packed, place, low, turn, count, width, base, there, BITS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """What a part of so many bits adds to the codes; `place` is where the lowest of a byte's rows have theirs."""
    below: tl.constexpr = BITS & (7 ^ (2 * PART - 1))  # the bits of the parts before
    fold: tl.constexpr = PART // (BITS & -BITS)  # this part's bytes hold that much fewer rows
    at = place + count // 8 * below + ((turn % fold) * base * width)[:, None]
    byte = tl.load(packed + at, mask=there[:, None], other=0).to(tl.int32)
    return ((byte >> (turn // fold * PART)[:, None]) & ((1 << PART) - 1)) << below


@triton.jit
def _codes(packed, low, turn, columns, count, width, base, there, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes [rows, columns] of the rows low + turn * base, out of `count` codes with `width` in a row."""
    place = low[:, None] * width + columns[None, :]
    if BITS == 8:
        found = tl.load(packed + place, mask=there[:, None], other=0).to(tl.int32) ^ 128
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
    WIDE: tl.constexpr,
):  # fmt: skip
    """The weights [rows, WIDE] of the rows low + turn * base from column `first` on, which are of one group."""
    there = low < base
    group = first // (width // groups)
    grid = (low + turn * base) * groups + group
    scale = tl.load(scales + grid, mask=there, other=0).to(tl.float32)
    if ZERO == 0:
        zero = tl.full(scale.shape, 1 << (BITS - 1), tl.float32)
    elif ZERO == 1:
        one = group + tl.arange(0, 1)
        zero = tl.sum(_codes(zeros, low, turn, one, out * groups, groups, base, there, BITS), 1).to(tl.float32)
    else:
        zero = tl.load(zeros + grid, mask=there, other=0).to(tl.float32)
    found = _codes(codes, low, turn, first + tl.arange(0, WIDE), out * width, width, base, there, BITS)
    return (found.to(tl.float32) - zero[:, None]) * scale[:, None]


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    codes, scales, zeros, out, width, groups, base, x, y, rows, BITS: tl.constexpr, ZERO: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    turns: tl.constexpr = 8 // (BITS & -BITS)
    apart: tl.constexpr = TALL // turns
    low, turn = tl.program_id(0) * apart + tl.arange(0, TALL) % apart, tl.arange(0, TALL) // apart
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, TALL), tl.float32)
    for first in range(0, width, WIDE):
        weights = _weights(codes, scales, zeros, out, width, groups, base, low, turn, first, BITS, ZERO, WIDE)
        at = row[:, None] * width + first + tl.arange(0, WIDE)[None, :]
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
    TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    turns: tl.constexpr = 8 // (BITS & -BITS)
    apart: tl.constexpr = TALL // turns
    low, turn = tl.program_id(0) * apart + tl.arange(0, TALL) % apart, tl.arange(0, TALL) // apart
    first = tl.program_id(1) * WIDE
    weights = _weights(codes, scales, zeros, out, width, groups, base, low, turn, first, BITS, ZERO, WIDE)
    at = (low + turn * base)[:, None] * width + first + tl.arange(0, WIDE)[None, :]
    tl.store(y + at, weights.to(y.dtype.element_ty), mask=(low < base)[:, None])
