"""One product with a pruned 2048 x 2048 matrix, however its zeros are stored. Nothing is asserted about time.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_sparse.py -o addopts= --benchmark-sort=name

`effbench.evidence.crossovers` times the kinds in turn; `extra_info` has the dense time over each kind's own.
"""

from statistics import median
from typing import Any

import pytest

from effbench.evidence import crossovers


@pytest.mark.parametrize("sparsity", crossovers.SPARSITIES)
def test_product(benchmark: Any, sparsity: float) -> None:
    found = benchmark.pedantic(crossovers.times, args=(sparsity,), rounds=1)
    for kind, by_rows in found.items():
        for rows, milliseconds in by_rows.items():
            ratios = [dense / own for dense, own in zip(found["dense"][rows], milliseconds, strict=True)]
            benchmark.extra_info[f"{kind}, {rows} rows"] = round(median(ratios), 3)
