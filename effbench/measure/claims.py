"""What a table claims of its rows together: differences that noise does not make, what could have been seen, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from effbench.measure import divergence, paired
from effbench.measure.significance import LEVEL, detectable, holm, ranks, turns_needed
from effbench.measure.statistics import p_of_student, paired_difference
from effbench.results import Record

if TYPE_CHECKING:
    from effbench.measure.derived import Row

SPEEDUPS = {
    "prefill_speedup": ("prefill_seconds", "prefill_seconds"),
    "decode_speedup": ("decode_seconds", "decode_seconds_per_token"),
}
"""Each ratio, the samples it comes from, and the column of this row's own time."""
LEAST_FREEDOM = 3.0
"""With fewer degrees of freedom what could have been seen is not known to any use."""
SAME = {
    "nll_difference": ("nll_per_token", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    "accuracy_difference": ("accuracy",),
    **{name: (column,) for name, (_, column) in SPEEDUPS.items()},
}
"""Columns that say the same as one that is tested."""


def claim(rows: Sequence[Row], dense: Record | None) -> None:
    """Correct the tests of these rows, which share a question, for each other; mark, rank, and say what could be seen.

    Each column is a family of tests, the parts of a column (tasks, conditions) another one.
    """
    others = [row for row in rows if row.record is not dense]
    families: dict[tuple[str, bool], dict[str, float]] = {}
    for place, row in enumerate(others):
        for name, p in row.tests.items():
            column, slash, _ = name.partition("/")
            families.setdefault((column, bool(slash)), {})[f"{place} {name}"] = p
    for tests in families.values():
        for key, p in holm(tests).items():
            number, _, name = key.partition(" ")
            _judge(others[int(number)], name, p, len(tests), dense)
    if dense is None:
        return
    _rank([row for row in rows if row.values.get("nll_difference") is not None], "quality_rank", _nats_below)
    real = [row for row in rows if row.values.get("decode_speedup") is not None and not row.simulated]
    _rank(real, "speed_rank", lambda one, other: _log_faster(one, other, dense))
    for row in rows:
        if row.simulated and row.values.get("decode_speedup") is not None:
            row.values["speed_rank"], row.missing["speed_rank"] = None, "simulated: it does not run what it promises"


def _judge(row: Row, name: str, p: float, tests: int, dense: Record | None) -> None:
    """What the corrected p of one test means for its row."""
    column, slash, part = name.partition("/")
    row.values[f"{column}_p{slash}{part}"] = paired.finite(p)
    nothing = 1.0 if column in SPEEDUPS else 0.0
    if not p < LEVEL and row.values[name] != nothing:
        same = [f"{other}{slash}{part}" for other in SAME.get(column, ())]
        row.within_noise |= {name, *same}
    seen, key = _seen(row, column, f"{slash}{part}", tests, dense), f"{column}_detectable{slash}{part}"
    if seen is not None:
        row.values[key] = paired.finite(seen)
    elif column in SPEEDUPS:
        row.values[key], row.missing[key] = None, "too few rounds or dense processes to tell"


def _seen(row: Row, column: str, part: str, tests: int, dense: Record | None) -> float | None:
    """The smallest effect that would have been claimed four times in five."""
    samples = row.record.samples
    if column == "nll_difference":
        blocks = len(divergence.blocks(samples["nll"], samples.get("documents")))
        error = row.values.get("nll_difference_stderr")
        return None if error is None else detectable(error, blocks - 1, tests)
    if column == "accuracy_difference" and not part:
        items = [len(values) for name, values in samples.items() if name.startswith("correct/")]
        error = row.values.get("accuracy_difference_stderr") or 0.0
        return max(detectable(error, math.inf, tests), turns_needed(tests) / sum(items))
    if column in SPEEDUPS and dense is not None:
        name = f"{SPEEDUPS[column][0]}{part}"
        found = paired.log_ratio(row.record, name)
        error, freedom = paired.with_strays(
            found.stderr, len(samples[name]), *paired.between(*paired.strays(dense, name))
        )
        known = error >= 0 and freedom >= LEAST_FREEDOM
        return math.exp(detectable(error, freedom, tests)) if known else None
    return None


def _rank(ranked: Sequence[Row], name: str, compared: Callable[[Row, Row], tuple[float, float]]) -> None:
    """Rank some rows: `compared` gives how much better one is than another, and the p of that."""
    pairs = {(one, other): compared(ranked[one], ranked[other]) for one, other in combinations(range(len(ranked)), 2)}
    p = holm({f"{one} {other}": p for (one, other), (_, p) in pairs.items()})

    def is_better(one: int, other: int) -> bool:
        first, second = sorted((one, other))
        better = pairs[first, second][0] * (1 if one == first else -1)
        return bool(better > 0 and p[f"{first} {second}"] < LEVEL)

    for place, (rank, shared) in ranks(range(len(ranked)), is_better).items():
        ranked[place].values[name] = rank
        if shared:
            ranked[place].tied.add(name)


def _nats_below(one: Row, other: Row) -> tuple[float, float]:
    """How many nats per token fewer one row has over the same windows."""
    ours, theirs = one.record.samples, other.record.samples
    documents = ours.get("documents")
    sums, tokens = (divergence.blocks(ours[name], documents) for name in ("nll", "tokens"))
    difference, error = paired_difference(divergence.blocks(theirs["nll"], documents), sums, tokens)
    return difference, p_of_student(difference, error, len(tokens) - 1)


def _log_faster(one: Row, other: Row, dense: Record) -> tuple[float, float]:
    """How much faster one row decodes, by their ratios to the same dense worker; each is a process of its own."""
    ours, theirs = (paired.log_ratio(row.record, "decode_seconds") for row in (one, other))
    count = min(len(row.record.samples["decode_seconds"]) for row in (one, other))
    apart, processes = paired.between(*paired.strays(dense, "decode_seconds"))
    stderr = float(np.hypot(ours.stderr, theirs.stderr))
    error, freedom = paired.with_strays(stderr, count, math.sqrt(2) * apart, processes)
    return ours.value - theirs.value, p_of_student(ours.value - theirs.value, error, freedom)
