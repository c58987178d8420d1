"""The table as GitHub Markdown, for READMEs and leaderboards."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.measure.derived import Row
from effbench.report import notes
from effbench.report.table import Table, View, build


def markdown(rows: Sequence[Row], views: Sequence[View] | None = None) -> str:
    """The table of these rows with its notes below; of all views unless some are given."""
    table = build(rows, views) if views is not None else build(rows)
    lines = [f"**{_escaped(notes.heading(rows))}**", "", *_grid(table), ""]
    said = [*notes.conditions(rows), *notes.legend(table), *notes.dashes(table), notes.LIMITS]
    return "\n".join([*lines, *(f"- {_escaped(note)}" for note in said)]) + "\n"


def _grid(table: Table) -> list[str]:
    heads = [
        f"{view.title} ({unit})" if unit else view.title for view, unit in zip(table.views, table.units, strict=True)
    ]
    lines = ["| " + " | ".join(["pipeline", *map(_escaped, heads)]) + " |", "|---|" + "---:|" * len(heads)]
    for line in table.lines:
        marked = " *simulated*" if line.row.simulated else ""
        cells = [_escaped(cell.text) + ("~" if cell.within_noise else "") for cell in line.cells]
        if line.reason:  # Markdown has no cell over several columns: the second one holds the reason
            cells = [f"*{_escaped(line.reason)}*", *[""] * (len(heads) - 1)]
        lines.append("| " + " | ".join([f"`{line.label}`{marked}", *cells]) + " |")
    return lines


def _escaped(text: str) -> str:
    for sign in "\\|*<_~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
