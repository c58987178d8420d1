"""Orderings of techniques that the field knows, in nats on one text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effbench.evidence.rows import Rows
from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number

ERRORS = 3.0

Ordering = tuple[str, str, float]
"""Better, worse, and how many times the better one's added nats the worse one adds at least."""

PLAIN: Sequence[Ordering] = (
    ("rtn:bits=4", "rtn:bits=3", 1),
    ("rtn:bits=3", "rtn:bits=2", 1),
    ("gptq:bits=3", "rtn:bits=3", 1),
    ("gptq:bits=2", "rtn:bits=2", 1),
    ("sparsegpt:compare=row", "wanda:sparsity=0.5", 1),
    ("sparsegpt", "wanda:compare=matrix", 1),
    ("sparsegpt:compare=row", "magnitude:sparsity=0.5,compare=row", 1),
    ("sparsegpt", "magnitude:sparsity=0.5", 1),
    ("svd_llm:keep=0.8", "svd:keep=0.8", 1),
    ("svd_llm:keep=0.6", "svd:keep=0.6", 1),
    ("bitnet", "bitnet:steps=0", 10),
)
STRESSED: Sequence[Ordering] = (("awq:bits=4", "rtn:bits=4", 2),)
"""With outlier channels."""

ASKED = {"ref-1m": PLAIN, "ref-3m": PLAIN, "ref-1m-outliers": STRESSED, "ref-3m-outliers": STRESSED}
"""By the folder of the suite."""


NOTES = (
    "Δnats: per token above dense, ± one standard error, paired over the same 256 windows of 511 tokens",
    "50 % sparsity throughout; with `compare=row` weights compete within a row, with `compare=matrix` within a "
    "matrix (SparseGPT: within each block of its columns), and only equals are compared",
    "`bitnet:steps=0` rounds to ternary without training; `-outliers`: with outlier channels that leave the "
    "function as it is, an artificial stressor",
)


def table(folder: Path) -> Table:
    """All orderings on all models."""
    return of_rows([(Rows.of(folder, name), asked) for name, asked in ASKED.items()], NOTES)


def of_rows(found: Sequence[tuple[Rows, Sequence[Ordering]]], notes: Sequence[str], title: str = "Orderings") -> Table:
    """Each model's rows beside what is asked of them."""
    return Table(
        title,
        f"The better technique adds fewer nats than the worse one, by at least {ERRORS:.0f} paired standard errors "
        "and by the factor that is asked for.",
        ("model", "better", "Δnats", "worse", "Δnats", "difference", "z", "factor", "asked"),
        [_line(rows, *ordering) for rows, asked in found for ordering in asked],
        after=notes,
    )


def _line(rows: Rows, better: str, worse: str, factor: float) -> Line:
    one, two, step = rows.above(better), rows.above(worse), rows.above(worse, better)
    names = [rows.name, f"`{better}`", f"`{worse}`"]
    asked = f"{factor:g}x" if factor > 1 else ""
    if one is None or two is None or step is None:
        figures = [number(*_figure(found)) if found else NOT_YET for found in (one, two)]
        return Line(
            [names[0], names[1], figures[0], names[2], figures[1], NOT_YET, NOT_YET, NOT_YET, asked],
            rows.without("dense", better, worse),
        )
    z, times = errors_from(*step), two[0] / one[0] if one[0] > 0 else float("inf")
    cells = [
        names[0], names[1], number(*_figure(one)), names[2], number(*_figure(two)), number(*_figure(step)),
        f"{z:.1f}", f"{times:.1f}x", asked,
    ]  # fmt: skip
    return Line(cells, z >= ERRORS and times >= factor)


def _figure(found: tuple[float, float]) -> tuple[float, int, float, bool]:
    return found[0], 4, found[1], True
