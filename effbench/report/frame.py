"""Records as a pandas DataFrame: one row for each, one column for each of `effbench.columns` that any of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from effbench.columns import COLUMNS
from effbench.measure.derived import Row
from effbench.protocols import TEXT_COLUMNS, label

FIRST = ("suite", "model", "pipeline", "seed", "status", "reason")
"""The columns that say what a row is."""


def column_names(rows: Sequence[Row]) -> list[str]:
    """The measured columns of these rows: those of `COLUMNS` in their order, then tasks and kinds, part by part."""
    there = {name for values in _values(rows) for name in values}
    plain = [name for column in COLUMNS for name in sorted(there) if name.partition(" (")[0] == column.name]
    parts = sorted(there - set(plain), key=lambda name: (name.partition("/")[2], name))
    return plain + parts


def row_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with the same keys each, ready for JSON: a missing value is `None`, its reason in `missing`."""
    names = column_names(rows)
    found = []
    for row, values in zip(rows, _values(rows), strict=True):
        record = row.record
        line: dict[str, Any] = {name: getattr(record, name) for name in FIRST}
        line["protocol"] = label(record)
        line["energy_source"] = record.provenance.get("energy", {}).get("source", "none")
        line |= {name: values.get(name) for name in names}
        line["simulated"], line["warnings"] = row.simulated, row.warnings
        line["missing"] = {name: why_missing(row, name) for name in names if line[name] is None}
        found.append(line)
    return found


def _values(rows: Sequence[Row]) -> list[dict[str, float | None]]:
    """Each row's values by column; where text was scored by several protocols, `perplexity (gptq 2048)` is one."""
    if len({label(row.record) for row in rows if row.values.get("perplexity") is not None}) < 2:
        return [row.values for row in rows]
    return [
        {
            f"{name} ({label(row.record)})" if name.partition("/")[0] in TEXT_COLUMNS else name: value
            for name, value in row.values.items()
        }
        for row in rows
    ]


def why_missing(row: Row, name: str) -> str:
    """Why this row has no value in a column."""
    name, _, protocol = name.rstrip(")").partition(" (")
    if protocol and label(row.record) != protocol:
        return "scored by another protocol of perplexity, with which it cannot be compared"
    if name in row.missing:
        return row.missing[name]
    status = row.record.status.replace("_", " ")
    if status == "running":
        return "not measured yet"
    return f"{status}: {row.record.reason}" if row.record.reason else "does not apply to this row"


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a DataFrame; missing numbers are NaN, and the column `missing` says why."""
    table = pd.DataFrame(row_dicts(rows))
    for name in column_names(rows):
        table[name] = pd.to_numeric(table[name])
    return table
