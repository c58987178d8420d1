"""What follows from raw samples when records are read: errors, differences and ratios to dense, honest marks.

Nothing here is stored, so a better statistic needs no new run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from effbench.measure import roofline
from effbench.measure.statistics import mean_and_stderr, paired_difference, paired_ratio
from effbench.results import Record

NOISE_ERRORS = 2.0
"""A difference of fewer standard errors than this is not told apart from none."""
SPEEDUPS = {
    "prefill_speedup": ("prefill_seconds", "prefill_seconds"),
    "decode_speedup": ("decode_seconds", "decode_seconds_per_token"),
}
"""Each ratio, the samples it comes from, and the column of this row's own time."""
BITS = {"float32": 32.0, "fp32": 32.0}
"""Bits of a dense weight in a run's dtype, where they are not 16."""


@dataclass(frozen=True)
class Row:
    """A record with all that is derived from it.

    Each name in `values` is a column, or a column and a part of it (`accuracy_stderr/piqa`); `missing` says why a
    value is `None`. `within_noise` are the columns that do not tell this row from the dense one. `simulated`: the
    bits that the options promise are not realised in the bytes.
    """

    record: Record
    values: dict[str, float | None]
    missing: dict[str, str]
    simulated: bool = False
    within_noise: frozenset[str] = field(default_factory=frozenset)


def rows(records: Sequence[Record]) -> list[Row]:
    """One row for each record, in their order, derived against the dense record of the same question and seed."""
    dense = {_question(record): record for record in records if record.pipeline == "dense"}
    return [_row(record, dense.get(_question(record))) for record in records]


def _question(record: Record) -> str:
    return json.dumps([record.suite, record.model, record.seed, record.settings], sort_keys=True)


def _row(record: Record, dense: Record | None) -> Row:
    values, missing, noise = dict(record.values), dict(record.missing), set[str]()
    for name, value in record.values.items():
        if value is not None and not math.isfinite(value):
            values[name], missing[name] = None, "it is not a finite number"
    for name in ("seconds", "peak_bytes", "tokens", "joules"):
        if name in record.cost:
            values[f"cost_{name}"] = record.cost[name]
    if record.cost and record.cost.get("joules") is None:
        missing["cost_joules"] = record.missing.get("joules_per_token", "no energy counter on this machine")
    _accuracy_errors(record, values)
    if record.status == "ok":
        near, why = roofline.shares(record)
        values |= near
        missing |= why
    if dense is not None:
        _against_dense(record, dense, values, missing, noise)
    elif record.status == "ok":
        for name in ("nll_difference", "nll_difference_stderr", *SPEEDUPS):
            values[name], missing[name] = None, "there is no dense row to compare with"
    within_noise = frozenset() if record is dense else frozenset(noise)
    return Row(record, values, missing, _is_simulated(record), within_noise)


def _accuracy_errors(record: Record, values: dict[str, float | None]) -> None:
    errors = []
    for name, items in record.samples.items():
        if name.startswith("correct/"):
            errors.append(mean_and_stderr(items)[1])
            values[f"accuracy_stderr/{name.partition('/')[2]}"] = _finite(errors[-1])
    if errors:
        values["accuracy_stderr"] = _finite(math.sqrt(sum(error**2 for error in errors)) / len(errors))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _against_dense(
    record: Record, dense: Record, values: dict[str, float | None], missing: dict[str, str], noise: set[str]
) -> None:
    """The paired difference in nats, the ratios of time, and which of them are within noise."""
    if "nll" in record.samples:
        if same_text(record, dense):
            difference, error = nats_difference(record, dense)
            values["nll_difference"], values["nll_difference_stderr"] = difference, _finite(error)
            if values["nll_difference_stderr"] is None:
                missing["nll_difference_stderr"] = "a single window of text has no spread"
            if 0 < abs(difference) <= NOISE_ERRORS * error:
                noise |= {"nll_difference", "nll_per_token", "perplexity", "bits_per_byte"}
        else:
            for name in ("nll_difference", "nll_difference_stderr"):
                values[name], missing[name] = None, "the dense row was scored on another text, or not yet"
    elif "nll_per_token" in missing:
        for name in ("nll_difference", "nll_difference_stderr"):
            values[name], missing[name] = None, missing["nll_per_token"]
    for name, (difference, error) in accuracy_differences(record, dense).items():
        if 0 < abs(difference) <= NOISE_ERRORS * error:
            noise.add(name)
    for name, (samples, column) in SPEEDUPS.items():
        theirs = record.samples.get(f"dense_{samples}")
        if not theirs:
            if record.status == "ok":
                values[name], missing[name] = None, missing.get(column, "not timed")
            continue
        ratio, low, high = paired_ratio(theirs, record.samples[samples])
        values[name], values[f"{name}_low"], values[f"{name}_high"] = ratio, _finite(low), _finite(high)
        if low <= 1 <= high or abs(math.log(ratio)) <= strays(dense, name):
            noise |= {name, column}


def strays(dense: Record, speedup: str) -> float:
    """How far from 1 the dense row's ratio to itself may lie, as a logarithm: what this machine makes of nothing."""
    samples, _ = SPEEDUPS[speedup]
    if not dense.samples.get(f"dense_{samples}"):
        return 0.0
    _, low, high = paired_ratio(dense.samples[f"dense_{samples}"], dense.samples[samples])
    return max(abs(math.log(low)), abs(math.log(high))) if math.isfinite(low) else 0.0


def same_text(one: Record, other: Record) -> bool:
    """Whether the nats of two records are sums over the same windows."""
    return (
        one.provenance.get("data_hash") == other.provenance.get("data_hash")
        and bool(one.samples.get("nll"))
        and one.samples.get("tokens") == other.samples.get("tokens")
        and len(one.samples["nll"]) == len(other.samples.get("nll", []))
    )


def nats_difference(one: Record, other: Record, kind: str = "") -> tuple[float, float]:
    """Nats per token of `one` above `other` over the same windows, and its standard error."""
    part = f"/{kind}" if kind else ""
    return paired_difference(one.samples[f"nll{part}"], other.samples[f"nll{part}"], one.samples[f"tokens{part}"])


def accuracy_differences(one: Record, other: Record) -> dict[str, tuple[float, float]]:
    """The accuracy of `one` above `other` and its standard error, paired over items: each task's, and their mean.

    Tasks that are not in both with as many items are left out.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, items in one.samples.items():
        theirs = other.samples.get(name, [])
        if name.startswith("correct/") and len(theirs) == len(items) > 1:
            pairs = zip(items, theirs, strict=True)
            found[f"accuracy/{name.partition('/')[2]}"] = mean_and_stderr([mine - his for mine, his in pairs])
    if found:
        mean = sum(difference for difference, _ in found.values()) / len(found)
        error = math.sqrt(sum(error**2 for _, error in found.values())) / len(found)
        found["accuracy"] = (mean, error)
    return found


def _is_simulated(record: Record) -> bool:
    """Whether the realised bits are nearer to those of the dense weights, or to those that the pipeline would promise
    without one of its techniques, than to those that it promises."""
    promised = record.values.get("promised_bits_per_weight")
    dense_bits = BITS.get(str(record.settings.get("dtype")), 16.0)
    realised = record.values.get("bits_per_weight")
    if realised is None and record.values.get("compressed_share") == 0:
        realised = dense_bits
    if promised is None or realised is None:
        return False
    less = [dense_bits, *record.samples.get("promised_bits_without_one", [])]
    return any(abs(realised - bits) < abs(realised - promised) for bits in less if bits > promised)
