"""What follows from raw samples when records are read: errors, differences and ratios to dense, honest marks.

Nothing here is stored, so a better statistic needs no new run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from effbench.measure import paired, roofline
from effbench.measure.claims import SPEEDUPS, claim
from effbench.measure.comparable import incomparable
from effbench.measure.disturbance import MOST
from effbench.measure.promise import is_simulated
from effbench.measure.statistics import mean_and_stderr, paired_difference
from effbench.results import Record


@dataclass
class Row:
    """A record with all that is derived from it.

    Each name in `values` is a column, or a column and a part of it (`accuracy_stderr/piqa`); `missing` says why a
    value is `None`. `within_noise` are the columns that do not tell this row from the dense one, `tied` the ranks that
    it shares. `simulated`: the bits that the options promise are not realised in the bytes, or what the
    options ask for is only imitated here. `warnings` are sentences about how far the row can be trusted, by a word for
    each.
    """

    record: Record
    values: dict[str, float | None]
    missing: dict[str, str]
    simulated: bool = False
    within_noise: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    warnings: dict[str, str] = field(default_factory=dict)
    tests: dict[str, float] = field(default_factory=dict)
    """The p of each test against dense, by column, before it is corrected for the others."""


def rows(records: Sequence[Record]) -> list[Row]:
    """One row for each record, in their order, derived against the dense record of the same question and seed."""
    dense = {_question(record): record for record in records if record.pipeline == "dense"}
    found = [_row(record, dense.get(_question(record))) for record in records]
    for question in dict.fromkeys(map(_question, records)):
        claim([row for row in found if _question(row.record) == question], dense.get(question))
    return found


def _question(record: Record) -> str:
    return json.dumps([record.model, record.seed, record.settings], sort_keys=True)


def _row(record: Record, dense: Record | None) -> Row:
    row = Row(
        record, dict(record.values), dict(record.missing), is_simulated(record, dense), warnings=_warnings(record)
    )
    values, missing = row.values, row.missing
    for name in ("seconds", "peak_bytes", "peak_device_bytes", "tokens", "joules"):
        if name in record.cost:
            values[f"cost_{name}"] = record.cost[name]
    if record.cost and record.cost.get("joules") is None:
        usual = record.missing.get("joules_per_token", "no energy counter on this machine")
        missing["cost_joules"] = record.missing.get("cost_joules", usual)
    _accuracy_errors(record, values)
    if record.status == "ok":
        near, why = roofline.shares(record)
        values |= near
        missing |= why
    paired.distance(record, values, missing)
    if record.status == "ok" or record.samples:
        _against_dense(row, dense)
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            values[name], missing[name] = None, paired.NOT_FINITE
    return row


def _warnings(record: Record) -> dict[str, str]:
    """What has to be said before any figure of this row is believed."""
    said = {}
    share = record.values.get("overlap")
    if share:
        read, windows = record.samples["overlap"]
        said["overlap"] = (
            f"{100 * share:.2g} % of the evaluated tokens, in {read:.0f} of {windows:.0f} windows, were read while it "
            "was applied; its quality is not that of unseen text"
        )
    shares = [value for name in record.samples if name.startswith("others_share") for value in record.samples[name]]
    disturbed = [value for value in shares if value > MOST]
    if disturbed:
        said["disturbed"] = (
            f"{len(disturbed)} of {len(shares)} timed rounds stayed disturbed when they were repeated: other work had "
            f"up to {100 * max(disturbed):.0f} % of the processors"
        )
    return said


def _accuracy_errors(record: Record, values: dict[str, float | None]) -> None:
    errors = []
    for name, items in record.samples.items():
        if name.startswith("correct/"):
            errors.append(mean_and_stderr(items)[1])
            values[f"accuracy_stderr/{name.partition('/')[2]}"] = paired.finite(errors[-1])
    if errors:
        values["accuracy_stderr"] = paired.finite(math.sqrt(sum(error**2 for error in errors)) / len(errors))


def _against_dense(row: Row, dense: Record | None) -> None:
    """The paired differences and the ratios of time, or why there are none."""
    record = row.record
    why = "there is no dense row to compare with" if dense is None else incomparable(record, dense)
    if dense is None or why:
        for name in ("nll_difference", "nll_difference_stderr", *SPEEDUPS):
            row.values[name], row.missing[name] = None, why
        return
    if "nll" in record.samples and same_text(record, dense):
        row.tests |= paired.text(record, dense, row.values, row.missing)
    elif record.status == "ok":
        why = "the dense row was scored on another text, or not yet"
        for name in ("nll_difference", "nll_difference_stderr"):
            row.values[name], row.missing[name] = None, row.missing.get("nll_per_token", why)
    row.tests |= paired.answers(record, dense, row.values)
    for name, (samples, column) in SPEEDUPS.items():
        for part in paired.timed(record, samples):
            row.tests |= paired.times(row.record, dense, f"{name}{part}", f"{samples}{part}", row.values, row.missing)
        if name not in row.values and record.status == "ok":
            row.values[name], row.missing[name] = None, row.missing.get(column, "not timed")


def same_text(one: Record, other: Record) -> bool:
    """Whether the nats of two records are sums over the same windows."""
    return (
        one.provenance.get("data_hash") == other.provenance.get("data_hash")
        and bool(one.samples.get("nll"))
        and one.samples.get("tokens") == other.samples.get("tokens")
        and len(one.samples["nll"]) == len(other.samples.get("nll", []))
    )


def nats_difference(one: Record, other: Record, *kinds: str) -> tuple[float, float]:
    """Nats per token of `one` above `other` over the same windows, and its standard error; of some kinds, if given."""
    parts = [f"/{kind}" if kind else "" for kind in kinds or ("",)]
    ours, theirs = (np.sum([record.samples[f"nll{part}"] for part in parts], 0) for record in (one, other))
    return paired_difference(ours, theirs, np.sum([one.samples[f"tokens{part}"] for part in parts], 0))


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
