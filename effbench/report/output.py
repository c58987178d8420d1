"""Where the command line writes to: a console of the right width, a table, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from effbench.measure.derived import Row

WIDTH = 140
"""Columns of a table that goes to a file or a pipe, unless COLUMNS says otherwise."""


def console(stream: Any) -> Console:
    """A console on a stream."""

    from rich.console import Console

    width = None if stream.isatty() else int(os.environ.get("COLUMNS") or WIDTH)
    return Console(file=stream, width=width, markup=False)


def print_table(rows: Sequence[Row], details: bool = False) -> None:
    """The rows as a table on standard output, or as the tables of all details."""
    from effbench.report import terminal
    from effbench.report.table import DETAILS

    out = console(sys.stdout)
    if not details:
        terminal.show(rows, out)
    for name, views in DETAILS.items() if details else ():
        out.print(f"{name}\n", highlight=False)
        terminal.show(rows, out, views)
        out.print()


def print_json(content: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def write_page(rows: Sequence[Row], path: Path | None) -> None:
    """Write the HTML page, if one was asked for and there are rows."""
    if path and rows:
        from effbench.report.page import write

        write(rows, path)
