"""Committed records -> the page with all tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effbench.evidence import (
    FOLDER,
    PRUNING,
    QUANTIZATION,
    facts,
    orderings,
    others,
    pruning,
    quantization,
    training,
    whole,
)
from effbench.evidence.table import Table


@dataclass(frozen=True)
class Shown:
    """A page: its title, the command that makes it, from its folder the tables in their order, and what is measured
    for them beside the folder's suites."""

    title: str
    command: str
    tables: Callable[[Path], list[Table]]
    measure: Callable[[Path], None] | None = None


def tables(folder: Path) -> list[Table]:
    """The reference family's."""
    return [
        *training.tables(folder),
        orderings.table(folder),
        others.eviction(folder),
        facts.falling(folder),
        others.draft(folder),
        others.distillation(folder),
        facts.knowledge(folder),
        whole.table(folder),
    ]


PAGES = {
    FOLDER: Shown("What the reference family shows", "make evidence", tables, whole.measure),
    QUANTIZATION: Shown("What quantization shows", "make quantization", quantization.tables, quantization.measure),
    PRUNING: Shown("What pruning and low rank show", "make pruning", pruning.tables, pruning.measure),
}
"""By the folder that a page and its records lie in."""


def page(folder: Path, shown: Shown = PAGES[FOLDER]) -> str:
    """The page as Markdown."""
    found = shown.tables(folder)
    head = [f"# {shown.title}", "", f"`{shown.command}` measures what is missing and writes this page.", ""]
    return "\n".join([*head, *filter(None, map(_summary, found)), "", *(table.markdown() for table in found)])


def _summary(table: Table) -> str:
    """How many of a table's claims hold; empty where it makes none."""
    claims = table.claims
    failed, open_claims = claims.count(False), claims.count(None)
    more = [f"**{failed} do not**"] if failed else []
    more += [f"{open_claims} are not measured yet"] if open_claims else []
    said = ", ".join([f"{claims.count(True)} of {len(claims)} lines hold", *more])
    return f"- {table.title}: {said}" if claims else ""
