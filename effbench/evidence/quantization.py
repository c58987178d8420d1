"""What is asked of quantization: figures of models, and times of packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effbench import harness, suite
from effbench.evidence import FOLDER, eight_bits, execution, smoothing
from effbench.evidence.measure import answerable
from effbench.evidence.orderings import Ordering, of_rows
from effbench.evidence.rows import Rows
from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number

MODELS = ("ref-1m", "ref-1m-outliers", "stories")
"""By the folder of the suite; what the reference family's own page has of a model is not measured twice."""
EIGHT_BITS = (
    "rtn:bits=8", "gptq:bits=8", "awq:bits=8", "hqq:bits=8",
    "smoothquant", "quarot:bits=8", "llm_int8", "quanto:bits=8",
)  # fmt: skip
BESIDE = "smoothquant:alpha=0.5"
"""The paper's alpha for models whose feedforward part has no gate, which these have."""
NATS = 0.002
"""What 8 bits may add or take."""
FEWER_BITS: Sequence[Ordering] = (("gptq:bits=3", "rtn:bits=3", 1), ("gptq:bits=2", "rtn:bits=2", 1))
ASKED: dict[str, Sequence[Ordering]] = {
    "ref-1m": FEWER_BITS,
    "stories": FEWER_BITS,
    "ref-1m-outliers": (("awq:bits=4", "rtn:bits=4", 1), ("quarot:bits=4,method=rtn", "rtn:bits=4", 1)),
}
ALPHAS = (*(f"smoothquant:alpha={alpha}" for alpha in ("0", "0.25", "0.5")), "smoothquant", "smoothquant:alpha=1")
"""From all range left with the inputs to all of it moved into the weights."""
NOTES = (
    "Δnats: per token above dense, ± one standard error, paired over the same windows; ref-1m: 256 windows of 511 "
    "tokens of the synthetic world; stories: TinyStories-656K on stories of its own training text, a story a window, "
    "calibrated on stories that it told itself (arXiv:2410.17170)",
    "`-outliers`: with outlier channels that leave the function as it is; `quarot` undoes them exactly, as it gives "
    "what norms multiply by to the matrices behind them",
)


def tables(folder: Path) -> list[Table]:
    """All of them, in the page's order."""
    rows = {name: Rows.of(folder, name).joined(Rows.of(FOLDER, name)) for name in MODELS}
    return [
        _eight_bits([rows["ref-1m"], rows["stories"]]),
        eight_bits.table(folder, "stories"),
        of_rows([(rows[name], asked) for name, asked in ASKED.items()], NOTES),
        _alphas(rows["ref-1m-outliers"]),
        smoothing.table(folder, "ref-1m-outliers"),
        execution.table(folder),
    ]


def measure(folder: Path) -> None:
    """What is no row of a suite, unless it is there already: experiments, and times of packed weights."""
    for name, experiment in (("stories", eight_bits.measure), ("ref-1m-outliers", smoothing.measure)):
        asked = harness.resolve(suite.load(str(folder / name / "suite.toml")))
        if answerable(asked):
            experiment(folder / name, asked)
    execution.measure(folder)


def _eight_bits(found: Sequence[Rows]) -> Table:
    lines = []
    for pipeline in (*EIGHT_BITS, BESIDE):
        figures = [rows.above(pipeline) for rows in found]
        cells = [number(*figure[:1], 5, figure[1], True) if figure else number(None, 5) for figure in figures]
        known = [abs(figure[0]) <= NATS for figure in figures if figure]
        holds = all(known) if len(known) == len(figures) else found[0].without(pipeline)
        lines.append(Line([f"`{pipeline}`", *cells], holds, pipeline != BESIDE))
    return Table(
        "8 bits change nothing that matters",
        f"Nats per token above dense lie within {NATS} of it.",
        ("pipeline", *(rows.name for rows in found)),
        lines,
    )


def _alphas(rows: Rows) -> Table:
    figures = {pipeline: rows.above(pipeline) for pipeline in ALPHAS}
    known = {pipeline: figure for pipeline, figure in figures.items() if figure}
    best = min(known, key=lambda pipeline: known[pipeline][0]) if len(known) == len(ALPHAS) else None
    lines = []
    for pipeline in ALPHAS:
        figure, step = figures[pipeline], rows.above(pipeline, best) if best else None
        cells = [f"`{pipeline}`", number(*figure[:1], 5, figure[1], True) if figure else NOT_YET]
        apart = step is not None and pipeline != best
        cells += [number(step[0], 5, step[1], True), f"{errors_from(*step):.1f}"] if step and apart else [NOT_YET] * 2
        lines.append(Line(cells, claims=False))
    return Table(
        "SmoothQuant's alpha in nats",
        "With outlier channels. Nats tell alphas apart only where they are far off; what is rounded away, below, does.",
        ("pipeline", f"Δnats, {rows.name}", "above the best", "z"),
        lines,
    )
