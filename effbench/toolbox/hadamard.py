"""Hadamard transforms of any width: every number in equal shares of all others, so that none stands out.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. There is one of each power of two (Sylvester), and, for a
prime q, one of size q + 1 if q is 3 modulo 4 and of size 2 (q + 1) if q is 1 modulo 4 (Paley); the Kronecker product of
two is one. A width that is no such product is transformed in blocks of the largest power of two that divides it.
All transforms here are scaled to be orthonormal.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

LARGEST_PALEY = 256
"""Sizes above it are not looked for: a factor is applied as a plain matrix product."""
LARGEST_POWER = 6
"""A larger power of two is applied as several factors of at most 2^6."""


@cache
def factors(width: int) -> tuple[int, ...]:
    """The sizes of the Hadamard matrices whose Kronecker product transforms a block; blocks fill `width`."""
    power = (width & -width).bit_length() - 1
    odd = width >> power
    sizes = [] if odd == 1 else _paley_sizes(odd, power)
    left = power if not sizes else power - ((sizes[0] // odd).bit_length() - 1)
    pieces = math.ceil(left / LARGEST_POWER)
    powers = [left // pieces + (piece < left % pieces) for piece in range(pieces)]
    return (*sizes, *(2**each for each in powers)) or (1,)


def turn(x: Tensor, *, back: bool = False) -> Tensor:
    """Each row of `x` (..., width) transformed, or, with `back`, transformed back; computed in float32."""
    sizes = factors(x.shape[-1])
    turned = x.float()
    after = math.prod(sizes)
    for size in sizes:
        after //= size
        matrix = hadamard(size, x.device)
        turned = torch.matmul(matrix.T if back else matrix, turned.reshape(-1, size, after))
    return turned.view_as(x).to(x.dtype)


def random_signs(width: int, seed: int) -> Tensor:
    """1 or -1 for each place (width,), as int8."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, (width,), generator=generator) - 1).to(torch.int8)


@cache
def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """An orthonormal Hadamard matrix (size, size) in float32.

    Raises `ValueError` for a size that is neither a power of two nor one of Paley's.
    """
    matrix = torch.ones(1, 1)
    if size & (size - 1):
        q, kind = _paley(size)
        matrix = _paley_matrix(q, kind)
    else:
        for _ in range(size.bit_length() - 1):
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (matrix / math.sqrt(size)).to(device or "cpu")


def _paley_sizes(odd: int, power: int) -> list[int]:
    """The smallest size of Paley that is `odd` times a power of two up to 2^power, alone in a list; or none."""
    sizes = (odd << shift for shift in range(2, power + 1))
    return [size for size in sizes if size <= LARGEST_PALEY and _paley(size)[0]][:1]


def _paley(size: int) -> tuple[int, int]:
    """The prime by which Paley makes a matrix of this size, and which of his two ways; zeros if there is none."""
    if _is_prime(size - 1) and size % 4 == 0:
        return size - 1, 1
    if size % 4 == 0 and _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return size // 2 - 1, 2
    return 0, 0


def _paley_matrix(q: int, kind: int) -> Tensor:
    if not q:
        raise ValueError("no Hadamard matrix of this size is known here; give a power of two or one of Paley's sizes")
    squares = {place * place % q for place in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if place in squares else -1.0 for place in range(1, q))])
    places = torch.arange(q)
    core = torch.zeros(q + 1, q + 1)
    core[1:, 1:] = character[(places[:, None] - places) % q]
    core[0, 1:] = 1
    core[1:, 0] = -1 if kind == 1 else 1
    if kind == 1:
        return core + torch.eye(q + 1)
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
