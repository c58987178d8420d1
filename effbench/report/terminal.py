"""The table on a terminal: as many columns as its width allows, reasons across the row, notes below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from effbench.measure.derived import Row
from effbench.report import notes
from effbench.report.table import VIEWS, Cell, Line, Table, View, build

LABEL_WIDTH = 28
"""Pipelines longer than this are broken at a `+` or a comma."""
SIMULATED = "simulated"


def show(rows: Sequence[Row], console: Console, views: Sequence[View] = VIEWS) -> None:
    """Print the table of these rows as wide as the console is; of some views if they are given."""
    whole = build(rows, views)
    labels = [_label(line) for line in whole.lines]
    first = max((len(part) for label in labels for part in label), default=0)
    table = _fit(whole, console.width - first)
    widths, columns = _widths(table), _columns(table)
    width = max(first + sum(widths) + 2 * len(widths), min(console.width, 60 if table.views else 100))
    _print(console, Text(notes.heading(rows), "bold"))
    _print(console, Text())
    titles = [view.title for view in table.views]
    for style, name, texts in (("bold", "pipeline", titles), ("dim", "", table.units))[: 2 if titles else 1]:
        cells = "".join(f"  {text:>{size}}" for text, size in zip(texts, widths, strict=True))
        _print(console, Text(f"{name:<{first}}{cells}", style))
    _print(console, Text("─" * width, "dim"))
    for line, label in zip(table.lines, labels, strict=True):
        for text in _drawn(line, label, first, [*zip(widths, columns, strict=True)], width):
            _print(console, text)
    _print(console, Text("─" * width, "dim"))
    hidden = [view.title for view in whole.views if view not in table.views]
    said = [*notes.conditions(rows), *notes.legend(table), *notes.dashes(table)]
    if hidden:
        said.append(f"left out for lack of width: {', '.join(hidden)}")
    for note in [*said, notes.LIMITS]:
        for part in textwrap.wrap(note, console.width, subsequent_indent="  ", break_on_hyphens=False):
            _print(console, Text(part, "dim"))


def _print(console: Console, text: Text) -> None:
    text.rstrip()
    console.print(text, overflow="ignore", no_wrap=True, crop=False, highlight=False)


def _fit(table: Table, room: int) -> Table:
    """The table without the views for which there is no room; the first rank stays."""
    while sum(_widths(table)) + 2 * len(table.views) > room:
        last = max(table.views, key=lambda view: view.rank, default=None)
        if last is None or last.rank == 0:
            break
        kept = [place for place, view in enumerate(table.views) if view is not last]
        table = replace(
            table,
            views=tuple(table.views[place] for place in kept),
            units=tuple(table.units[place] for place in kept),
            lines=tuple(
                replace(line, cells=tuple(line.cells[place] for place in kept)) if line.cells else line
                for line in table.lines
            ),
        )
    return table


def _written(cell: Cell, column: Sequence[Cell]) -> str:
    """The cell, with room for the sign of noise where a cell of its column has it."""
    return cell.text + ("~" if cell.within_noise else " " if any(other.within_noise for other in column) else "")


def _columns(table: Table) -> list[list[Cell]]:
    return [[line.cells[place] for line in table.lines if line.cells] for place in range(len(table.views))]


def _widths(table: Table) -> list[int]:
    return [
        max(len(view.title), len(unit), *(len(_written(cell, column)) for cell in column))
        for view, unit, column in zip(table.views, table.units, _columns(table), strict=True)
    ]


def _label(line: Line) -> list[str]:
    """The pipeline, in as many parts as it takes, and what has to be said of the whole row."""
    parts = [""]
    pieces = line.label.replace("+", "\0+").replace(",", ",\0").split("\0")
    for piece in pieces:
        if parts[-1] and len(parts[-1]) + len(piece) > LABEL_WIDTH:
            parts.append(" ")
        parts[-1] += piece
    if line.row.simulated:
        if len(parts[-1]) + len(SIMULATED) + 1 > LABEL_WIDTH:
            parts.append("")
        parts[-1] += f" {SIMULATED}"
    return parts


def _drawn(
    line: Line, label: Sequence[str], first: int, columns: Sequence[tuple[int, Sequence[Cell]]], width: int
) -> list[Text]:
    """The lines of text that one row takes."""
    style = "bold" if line.row.record.pipeline == "dense" else ""
    drawn = [Text(f"{part:<{first}}", style) for part in label]
    for text in drawn:
        text.highlight_words([f" {SIMULATED}"], "yellow")
    if line.reason:
        room = max(24, width - first - 2)
        for number, part in enumerate(textwrap.wrap(line.reason, room)):
            if number == len(drawn):
                drawn.append(Text(" " * first))
            drawn[number].append(f"  {part}", "yellow" if line.row.record.status == "unfit" else "red")
        return drawn
    for cell, (size, column) in zip(line.cells, columns, strict=True):
        quiet = cell.within_noise or cell.value is None
        drawn[0].append(f"  {_written(cell, column):>{size}}", "dim" if quiet else style)
    return drawn
