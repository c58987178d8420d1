"""A row against dense, sample by sample: what differs, by how much, and the p of each test before any correction.

Every function puts figures into `values`, the reason of each that cannot be had into `missing`, and gives the p of
its tests by the column they are about.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from effbench.measure import divergence
from effbench.measure.significance import mcnemar
from effbench.measure.statistics import Estimate, freedom_of_rounds, over_blocks, over_items, over_rounds, p_of_student
from effbench.results import Record

Values = dict[str, float | None]
Tests = dict[str, float]
ONE_BLOCK = "a single window of text has no spread"
NOT_FINITE = "it is not a finite number"


def finite(value: Any) -> float | None:
    """The value where it is a number."""
    return float(value) if math.isfinite(value) else None


def put_interval(values: Values, missing: dict[str, str], name: str, found: Estimate, why: str) -> None:
    """The ends of an interval as columns of their own, for a part of a column too."""
    column, slash, part = name.partition("/")
    for end, value in (("low", found.low), ("high", found.high)):
        key = f"{column}_{end}{slash}{part}"
        values[key] = finite(value)
        if values[key] is None:
            missing[key] = why


def text(record: Record, dense: Record, values: Values, missing: dict[str, str]) -> Tests:
    """Nats per token above dense over the same windows."""
    documents = record.samples.get("documents")
    ours, theirs, tokens = (
        divergence.blocks(sums, documents)
        for sums in (record.samples["nll"], dense.samples["nll"], record.samples["tokens"])
    )
    found = over_blocks(ours - theirs, tokens)
    if not math.isfinite(found.value):
        for name in ("nll_difference", "nll_difference_stderr"):
            values[name], missing[name] = None, NOT_FINITE
        return {}
    values["nll_difference"], values["nll_difference_stderr"] = found.value, finite(found.stderr)
    if values["nll_difference_stderr"] is None:
        missing["nll_difference_stderr"] = ONE_BLOCK
    put_interval(values, missing, "nll_difference", found, ONE_BLOCK)
    return {"nll_difference": found.p}


def distance(record: Record, values: Values, missing: dict[str, str]) -> None:
    """Divergence from dense and agreement with it, with intervals."""
    if "kl_quantiles" not in record.samples:
        return
    for name, found in divergence.estimates(record.samples, record.samples.get("documents")).items():
        values.setdefault(name, found.value)
        why = "too few tokens or windows for an interval" if name in divergence.QUANTILES else ONE_BLOCK
        put_interval(values, missing, name, found, why)


def answers(record: Record, dense: Record, values: Values) -> Tests:
    """Answers that turned wrong and right, of each task and of all; the difference of the mean accuracy.

    Tasks that are not in both with as many items are left out.
    """
    turned: dict[str, tuple[int, int, int]] = {}
    for name, items in record.samples.items():
        theirs = dense.samples.get(name, [])
        if name.startswith("correct/") and len(theirs) == len(items) > 0:
            ours, before = np.asarray(items), np.asarray(theirs)
            turned[name.partition("/")[2]] = (int((ours > before).sum()), int((ours < before).sum()), len(items))
    if not turned:
        return {}
    tests = {}
    for task, (gained, lost, items_there) in turned.items():
        values[f"flips_to_right/{task}"], values[f"flips_to_wrong/{task}"] = gained, lost
        values[f"accuracy_difference/{task}"] = (gained - lost) / items_there
        tests[f"accuracy_difference/{task}"] = mcnemar(gained, lost)
    found = over_items(*np.array(list(turned.values())).T)
    values["accuracy_difference"], values["accuracy_difference_stderr"] = found.value, finite(found.stderr)
    put_interval(values, {}, "accuracy_difference", found, "")
    gained, lost = (sum(counts[place] for counts in turned.values()) for place in (0, 1))
    values["flips_to_right"], values["flips_to_wrong"] = gained, lost
    return tests | {"accuracy_difference": mcnemar(gained, lost)}


def timed(record: Record, samples: str) -> list[str]:
    """The conditions under which these samples of time were taken beside dense: "", and "/" and its name."""
    prefix = f"dense_{samples}"
    return [name.removeprefix(prefix) for name in record.samples if name == prefix or name.startswith(f"{prefix}/")]


def times(record: Record, dense: Record, name: str, samples: str, values: Values, missing: dict[str, str]) -> Tests:
    """Dense time over this row's, over rounds in turn: what slows both cancels, and what hits one is left out.

    The test of it adds how far fresh processes of the dense model stray from the dense worker: what a machine makes of
    nothing at all.
    """
    found = log_ratio(record, samples)
    values[name] = math.exp(found.value)
    with np.errstate(over="ignore"):  # of few rounds the upper end may be beyond any float
        ends = found._replace(low=np.exp(found.low), high=np.exp(found.high))
    put_interval(values, missing, name, ends, "a single round has no spread")
    stderr, freedom = with_strays(found.stderr, len(record.samples[samples]), *between(*strays(dense, samples)))
    return {name: p_of_student(found.value, stderr, freedom)}


def log_ratio(record: Record, samples: str) -> Estimate:
    """The logarithm of dense time over this row's."""
    ours, theirs = (np.asarray(record.samples[name], float) for name in (samples, f"dense_{samples}"))
    return over_rounds(np.log(theirs) - np.log(ours))


def strays(dense: Record, samples: str) -> tuple[list[float], list[float]]:
    """The logarithm of the dense worker's time over that of each fresh process of the dense model, and its error."""
    values = list(dense.samples.get(f"strays/{samples}", []))
    errors = list(dense.samples.get(f"strays_stderr/{samples}", [0.0] * len(values)))
    if dense.samples.get(f"dense_{samples}"):
        own = log_ratio(dense, samples)
        values, errors = [*values, own.value], [*errors, own.stderr]
    return values, errors


def between(values: list[float], errors: list[float]) -> tuple[float, int]:
    """How far processes of one model lie apart beyond what their rounds' errors explain, and how many there were.

    The strays are known to lie about 0, so that their mean square, less that of their errors, is the variance.
    """
    if not values:
        return 0.0, 0
    variance = np.mean(np.square(values)) - np.mean(np.square(np.nan_to_num(errors)))
    return math.sqrt(max(0.0, float(variance))), len(values)


def with_strays(stderr: float, count: int, apart: float, processes: int) -> tuple[float, float]:
    """The error of a ratio of times over `count` rounds with that of its process added, and its degrees of freedom.

    Welch's degrees of freedom would be more, and too many where the strays happen to be small: with the fewer of the
    two a false claim is never likelier than its level.
    """
    freedom = freedom_of_rounds(count)
    if not processes or not stderr >= 0:
        return stderr, freedom
    return math.hypot(stderr, apart), min(freedom, processes)
