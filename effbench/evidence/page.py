"""Committed records -> the page with all tables."""

from __future__ import annotations

from pathlib import Path

from effbench.evidence import facts, orderings, others, training
from effbench.evidence.table import Table


def tables(folder: Path) -> list[Table]:
    """All of them, in the page's order."""
    return [
        *training.tables(folder),
        orderings.table(folder),
        others.eviction(folder),
        facts.falling(folder),
        others.draft(folder),
        others.distillation(folder),
        facts.knowledge(folder),
    ]


def page(folder: Path) -> str:
    """The page as Markdown."""
    found = tables(folder)
    head = [
        "# What the reference family shows",
        "",
        "`make evidence` measures what is missing and writes this page.",
        "",
    ]
    return "\n".join([*head, *filter(None, map(_summary, found)), "", *(table.markdown() for table in found)])


def _summary(table: Table) -> str:
    """How many of a table's claims hold; empty where it makes none."""
    claims = table.claims
    failed, open_claims = claims.count(False), claims.count(None)
    more = [f"**{failed} do not**"] if failed else []
    more += [f"{open_claims} are not measured yet"] if open_claims else []
    said = ", ".join([f"{claims.count(True)} of {len(claims)} lines hold", *more])
    return f"- {table.title}: {said}" if claims else ""
