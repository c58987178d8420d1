"""Decoding and prefill of a wide model and of what pruning and low rank leave of it. Nothing is asserted about time.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_wide.py -o addopts=

`effbench.evidence.wide` times all in turn; `extra_info` has each one's time over the dense time, beside the weights'.
"""

from typing import Any

from effbench.evidence import wide
from effbench.measure.statistics import paired_ratio


def test_rounds_in_turn(benchmark: Any) -> None:
    found = dict(wide.systems())
    seconds = benchmark.pedantic(wide.in_turn, args=(found, 3), rounds=1)
    dense = wide.multiplied(found["dense"].model)
    for name, system in found.items():
        ratios = {kind: paired_ratio(seconds[name][kind], seconds["dense"][kind])[0] for kind in wide.TIMED}
        weights = wide.multiplied(system.model) / dense
        benchmark.extra_info[name] = {"weights": round(weights, 3), **{k: round(v, 3) for k, v in ratios.items()}}
