"""GPTQ on a 2048 x 2048 layer with 128 x 512 calibration tokens, beside its published loop written down plainly.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_gptq_speed.py -o addopts= --benchmark-json=-

Both in turn, so that what slows the machine slows both; `extra_info` has the plain loop's time over ours. Asserted is
only that both end with the same weights.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effbench.registry import get
from effbench.technique import Inputs

WIDTH, SEQUENCES, LENGTH, ROUNDS = 2048, 128, 512, 3


def plain_gram(chunks: list[Tensor]) -> Tensor:
    """The mean over sequences of 2 X^T X, taken in one by one."""
    gram = torch.zeros(WIDTH, WIDTH)
    for count, chunk in enumerate(chunks):
        rows = chunk.float().T
        gram *= count / (count + 1)
        rows = (2 / (count + 1)) ** 0.5 * rows
        gram += rows @ rows.T
    return gram


def plain_loop(weight: Tensor, gram: Tensor, bits: int, damping: float = 0.01, block_size: int = 128) -> Tensor:
    """Algorithm 1 of the paper (arXiv:2210.17323) with one asymmetric grid a row: the weights it ends with."""
    weight = weight.float().clone()
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    result = torch.zeros_like(weight)
    for start in range(0, WIDTH, block_size):
        end = start + block_size
        block, inner = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(block)
        for step in range(block_size):
            column = block[:, step]
            codes = ((column / scale).round() + zero).clamp(0, 2**bits - 1)
            result[:, start + step] = scale * (codes - zero)
            errors[:, step] = (column - result[:, start + step]) / inner[step, step]
            block[:, step:] -= errors[:, step, None] @ inner[None, step, step:]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result


def case() -> tuple[Tensor, list[Tensor]]:
    """A weight (out, in) and its inputs, one tensor (tokens, in) a sequence, in bfloat16."""
    torch.manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    chunks = [(torch.randn(LENGTH, WIDTH) @ mixing).bfloat16() for _ in range(SEQUENCES)]
    return (torch.randn(WIDTH, WIDTH) * 0.02).bfloat16(), chunks


def ours(weight: Tensor, chunks: list[Tensor]) -> Tensor:
    """The weights that the technique's layer computes with."""
    linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    packed: Any = get("gptq")(bits=4, scale_dtype="float32").layer(linear, Inputs(chunks, only=("gram",)))
    found: Tensor = packed.dequantized()
    return found


def in_turn(ways: dict[str, Callable[[Tensor, list[Tensor]], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way's rounds."""
    weight, chunks = case()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ended: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            ended[name] = way(weight, chunks)
            seconds[name].append(time.perf_counter() - start)
    first, *others = ended.values()
    assert all(float((first != other).float().mean()) < 1e-2 for other in others)
    return seconds


@pytest.mark.parametrize("threads", [1, 2])
def test_no_slower_than_the_published_loop(benchmark: Any, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ways = {"ours": ours, "plain": lambda weight, chunks: plain_loop(weight, plain_gram(chunks), 4)}
    seconds = benchmark.pedantic(in_turn, args=(ways, ROUNDS), rounds=1)
    torch.set_num_threads(before)
    ratios = [plain / own for own, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    benchmark.extra_info["plain loop's time over ours"] = round(median(ratios), 3)
