"""One product with a pruned 2048 x 2048 matrix: masked, as a bitmask, as CSR. Nothing is asserted about time.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_sparse.py -o addopts= --benchmark-sort=name

The kinds are timed in turn, round by round, so that what slows the machine slows all of them: `extra_info` has each
kind's milliseconds and the dense time over its own. Six matrices take turns, so that none stays in the cache.
"""

import time
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from effbench.toolbox.sparse import pruned

WIDTH, MATRICES, ROUNDS = 2048, 6, 9
KINDS = ("dense", "bitmask", "csr")


@pytest.fixture(scope="module", params=[0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98])
def layers(request: Any) -> dict[str, list[nn.Module]]:
    """The same pruned matrices in each kind of storage."""
    torch.manual_seed(0)
    made: dict[str, list[nn.Module]] = {kind: [] for kind in KINDS}
    for _ in range(MATRICES):
        weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
        gone = torch.rand(WIDTH, WIDTH) < request.param
        for kind, some in made.items():
            linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            some.append(pruned(linear, gone, kind))
    return made


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_product(benchmark: Any, layers: dict[str, list[nn.Module]], rows: int) -> None:
    x = torch.randn(rows, WIDTH, dtype=torch.bfloat16)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    @torch.inference_mode()
    def turn() -> None:
        for kind, some in layers.items():
            start = time.perf_counter()
            for layer in some:
                layer(x)
            seconds[kind].append((time.perf_counter() - start) / MATRICES)

    benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=2)
    for kind in KINDS:
        ratios = [dense / own for dense, own in zip(seconds["dense"], seconds[kind], strict=True)]
        benchmark.extra_info[f"{kind}_milliseconds"] = round(1e3 * median(seconds[kind]), 3)
        benchmark.extra_info[f"{kind}_speedup"] = round(median(ratios[2:]), 3)
