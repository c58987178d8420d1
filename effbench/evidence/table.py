"""A table of claims as Markdown, and how its figures are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

NOT_YET = "–"
"""Stands for a figure that has not been measured."""
HOLDS = {True: "yes", False: "**no**", None: "not yet"}


@dataclass(frozen=True)
class Line:
    """One line: its cells, and whether what the table says holds on it; `None` where it is not measured yet.

    `claims`: whether the line is one of those that have to hold.
    """

    cells: Sequence[str]
    holds: bool | None = None
    claims: bool = True


@dataclass(frozen=True)
class Table:
    """`says`: what it shows, in a sentence. `after`: notes below it."""

    title: str
    says: str
    heads: Sequence[str]
    lines: Sequence[Line]
    after: Sequence[str] = field(default=())

    @property
    def claims(self) -> list[bool | None]:
        """The verdict of each line that makes a claim."""
        return [line.holds for line in self.lines if line.claims]

    def markdown(self) -> str:
        """Title, sentence, table, notes."""
        heads = [*self.heads, "holds"] if self.claims else list(self.heads)
        rows = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        for line in self.lines:
            cells = [*line.cells, HOLDS[line.holds] if line.claims else ""] if self.claims else line.cells
            rows.append("| " + " | ".join(cells) + " |")
        notes = ["", *(f"- {note}" for note in self.after)] if self.after else []
        return "\n".join([f"## {self.title}", "", self.says, "", *rows, *notes]) + "\n"


def number(value: float | None, digits: int, error: float | None = None, signed: bool = False) -> str:
    """With so many decimals, and its standard error behind ±."""
    if value is None or not math.isfinite(value):
        return NOT_YET
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if error is None or not math.isfinite(error) else f"{text} ±{error:.{digits}f}"


def errors_from(value: float, error: float) -> float:
    """How many standard errors a figure lies from zero."""
    return value / error if error else math.copysign(math.inf, value)
