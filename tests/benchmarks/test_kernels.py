"""One decoded row through a 2048 x 2048 matrix, dense and packed. Nothing is asserted about time.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_kernels.py -o addopts= --benchmark-group-by=param:rows

Six matrices take turns, so that none stays in the cache.
"""

from typing import Any

import pytest
import torch
from torch import nn

from effbench.registry import get

WIDTH, MATRICES = 2048, 6
KINDS: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
}


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_product(benchmark: Any, kind: str, rows: int) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(MATRICES)]
    options = KINDS[kind]
    if options is not None:
        layers = [get("rtn")(**options).layer(layer, None) for layer in layers]
    x = torch.randn(rows, WIDTH, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            layer(x)

    benchmark(run)
