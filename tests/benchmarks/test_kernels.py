"""A Llama's block of width 2048, dense and packed in every way, in turn. Nothing is asserted about time.

    python -m pytest tests/benchmarks/test_kernels.py -o addopts=

What slows the machine slows all kinds of a round: `extra_info` has the dense time over each kind's own. The same
figures, with more rounds, are committed as a table by `make quantization`.
"""

from statistics import median
from typing import Any

import pytest

from effbench.evidence import execution

ROUNDS = 3


@pytest.fixture(scope="module")
def blocks() -> dict[str, Any]:
    """The block, once for all numbers of rows and threads."""
    return execution.blocks()


@pytest.mark.parametrize("threads", execution.THREADS)
@pytest.mark.parametrize("rows", execution.ROWS)
def test_block(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, blocks: dict[str, Any], rows: int, threads: int
) -> None:
    monkeypatch.setattr(execution, "blocks", lambda: blocks)
    found = benchmark.pedantic(lambda: execution.times(ROUNDS, (rows,), (threads,)), rounds=1)
    seconds = found["seconds"][str(threads)]
    dense = seconds[execution.DENSE][str(rows)]
    for kind, times in seconds.items():
        ratios = [one / own for one, own in zip(dense, times[str(rows)], strict=True)]
        benchmark.extra_info[f"{kind} speedup"] = round(median(ratios), 3)
