"""Cache eviction, a draft and a teacher: what becomes of text, of lookups and of a student."""

from __future__ import annotations

from pathlib import Path

from effbench.evidence.rows import Rows
from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number
from effbench.measure.derived import accuracy_differences

EVICTED, TASK = "sink_window:window=124", "ref_retrieval"
FALL, STILL = 0.20, 0.02
"""Retrieval falls by so much, nats of the tokens that no lookup decides move by less than that."""
UNDECIDED, SHOWN = ("template", "noise"), ("template", "noise", "context")

ONE_AHEAD, DRAFTS = "draft:model=ref-70k,ahead=1", ("draft:model=ref-70k,ahead=1", "draft:model=ref-70k")
ACCEPTED = 0.75

STUDENTS = (
    ("distill:alpha=1,tokens=32768", "distill:alpha=0,tokens=32768"),
    (
        "distill:student=ref-300k,alpha=1,lr=0.0005,tokens=32768",
        "distill:student=ref-300k,alpha=0,lr=0.0005,tokens=32768",
    ),
)
"""The same student with a teacher and with the text alone, which is read seven times and a half."""
APART = 5.0


def eviction(folder: Path) -> Table:
    """What a cache of a quarter of the context costs."""
    lines = []
    for name in ("ref-1m", "ref-3m"):
        rows = Rows.of(folder, name)
        dense, evicted = rows.get("dense"), rows.get(EVICTED)
        kinds = [rows.above(EVICTED, kinds=kinds) for kinds in (UNDECIDED, *((kind,) for kind in SHOWN))]
        if dense is None or evicted is None or None in kinds:
            lines.append(Line([name, *[NOT_YET] * (4 + len(SHOWN))], rows.without("dense", EVICTED)))
            continue
        fall, error = accuracy_differences(evicted, dense)[f"accuracy/{TASK}"]
        shares = [number(row.values[f"accuracy/{TASK}"], 3) for row in (dense, evicted)]
        moved = [number(found[0], 4, found[1], True) for found in kinds if found]
        still = kinds[0] is not None and abs(kinds[0][0]) < STILL
        lines.append(Line([name, *shares, number(fall, 3, error, True), *moved], fall <= -FALL and still))
    return Table(
        "Cache eviction",
        f"A cache of 128 of 512 tokens (`{EVICTED}` and 4 sinks) costs retrieval at least {100 * FALL:.0f} points, "
        f"while the nats of template and noise tokens move by less than {STILL}: perplexity hardly shows it.",
        ("model", "retrieval, dense", "evicted", "difference", "Δnats template and noise", *SHOWN),
        lines,
        after=("256 items over lists of 64 to 410 tokens, asked through the cache; ± one standard error, paired",),
    )


def draft(folder: Path) -> Table:
    """How often ref-3m accepts what ref-70k proposes."""
    rows, lines = Rows.of(folder, "draft"), []
    for pipeline in DRAFTS:
        row, claims = rows.get(pipeline), pipeline == ONE_AHEAD
        if row is None:
            lines.append(Line([f"`{pipeline}`", NOT_YET, NOT_YET], rows.without(pipeline), claims))
            continue
        rate = row.values["acceptance_rate"]
        cells = [f"`{pipeline}`", number(rate, 3), number(row.values["tokens_per_pass"], 2)]
        lines.append(Line(cells, rate is not None and rate > ACCEPTED, claims))
    return Table(
        "Draft",
        f"ref-3m, decoding greedily, accepts more than {ACCEPTED} of the tokens that ref-70k proposes after accepted "
        "text.",
        ("pipeline", "accepted", "tokens a pass"),
        lines,
        after=(
            "32 prompts of 128 tokens, 96 new ones each; the claim is about `ahead=1`, where every proposal follows "
            "accepted text (the acceptance rate of Leviathan et al., arXiv:2211.17192): further ahead a proposal also "
            "falls with the one before it",
        ),
    )


def distillation(folder: Path) -> Table:
    """A teacher against the text alone, on the same tokens and steps."""
    rows, lines = Rows.of(folder, "ref-3m"), []
    for taught, alone in STUDENTS:
        step = rows.above(taught, alone)
        figures = [rows.above(pipeline) for pipeline in (taught, alone)]
        cells = [f"`{taught}`", *(number(found[0], 4, found[1], True) if found else NOT_YET for found in figures)]
        if step is None:
            lines.append(Line([*cells, NOT_YET, NOT_YET], rows.without("dense", taught, alone)))
            continue
        z = errors_from(*step)
        lines.append(Line([*cells, number(step[0], 4, step[1], True), f"{z:.1f}"], z <= -APART))
    return Table(
        "Distillation",
        "A student of ref-3m that reads 32,768 tokens over and over learns more from its teacher's distribution than "
        f"from the text alone, by at least {APART:.0f} paired standard errors.",
        ("student", "Δnats, taught", "Δnats, text alone", "difference", "z"),
        lines,
        after=(
            "text alone: the same tokens in the same order and the same 240 steps, with alpha=0; without `student` it "
            "is half of the teacher's blocks, otherwise a checkpoint that was trained to its end",
            "Δnats: above ref-3m",
        ),
    )
