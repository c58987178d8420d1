"""What the family knows of people: which facts fall first, and how many bits of them are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effbench import reference
from effbench.evidence.rows import Rows
from effbench.evidence.table import NOT_YET, Line, Table, number
from effbench.measure.derived import same_text
from effbench.reference.lexicon import Lexicon
from effbench.reference.people import ATTRIBUTES, People
from effbench.results import Record

FREQUENT, RARE = "fact_frequent", "fact_rare"

DAMAGED = (
    "rtn:bits=4", "rtn:bits=3", "gptq:bits=3", "gptq:bits=2", "magnitude:sparsity=0.5", "wanda:sparsity=0.5",
    "sparsegpt", "svd:keep=0.8", "svd_llm:keep=0.8", "bitnet",
)  # fmt: skip
TIMES, TECHNIQUES = 2.0, 3
"""Rare values lose so many times the nats of frequent ones, for at least so many techniques on a model."""
RESAMPLES = 2000

ROUNDED = ("dense", "rtn:bits=8", "rtn:bits=4", "rtn:bits=3", "rtn:bits=2")


def falling(folder: Path) -> Table:
    """Nats added per rare value over nats added per frequent value."""
    lines = []
    for name in ("ref-1m", "ref-3m"):
        rows, verdicts = Rows.of(folder, name), list[bool]()
        for pipeline in DAMAGED:
            frequent, rare = (rows.above(pipeline, kinds=(kind,)) for kind in (FREQUENT, RARE))
            row, dense = rows.get(pipeline), rows.get("dense")
            if row is None or dense is None or frequent is None or rare is None:
                lines.append(Line([name, f"`{pipeline}`", *[NOT_YET] * 4], claims=False))
                continue
            ratio, low, high = rare_over_frequent(row, dense)
            figures = [number(value, 3, error, True) for value, error in (frequent, rare)]
            verdicts.append(ratio >= TIMES and low > 1)
            interval = f"{number(ratio, 2)} [{number(low, 2)}–{number(high, 2)}]"
            lines.append(Line([name, f"`{pipeline}`", *figures, interval, "x" if verdicts[-1] else ""], claims=False))
        enough = sum(verdicts) >= TECHNIQUES
        said = f"{sum(verdicts)} of {len(verdicts)}" if verdicts else NOT_YET
        over = len(verdicts) + len(rows.ended.intersection(DAMAGED)) == len(DAMAGED)
        holds = enough if enough or over else None
        lines.append(Line([name, "together", "", "", "", said], holds))
    return Table(
        "Rare facts fall first",
        f"A rare person's value loses at least {TIMES:.0f} times the nats that a frequent person's loses, with an "
        f"interval above 1, by at least {TECHNIQUES} techniques on each model.",
        ("model", "technique", "nats added, frequent", "rare", "rare / frequent", "so"),
        lines,
        after=(
            f"± one standard error, paired over windows; [ ] 95 % interval of {RESAMPLES:,} bootstrap resamples of the "
            "windows",
        ),
    )


def rare_over_frequent(row: Record, dense: Record) -> tuple[float, float, float]:
    """The ratio of the nats added per value, and the ends of its 95 % bootstrap interval over windows.

    Raises `ValueError` where the two rows are of different text.
    """
    if not same_text(row, dense):
        raise ValueError("the two rows were scored on different text")
    added, counts = (
        np.array([[*one.samples[f"{what}/{kind}"]] for kind in (FREQUENT, RARE)])
        for one, what in ((row, "nll"), (row, "tokens"))
    )
    added = added - np.array([dense.samples[f"nll/{kind}"] for kind in (FREQUENT, RARE)])
    windows = added.shape[1]
    drawn = np.random.default_rng(0).multinomial(windows, np.full(windows, 1 / windows), RESAMPLES)
    frequent, rare = (added @ drawn.T) / (counts @ drawn.T)
    whole = added.sum(1) / counts.sum(1)
    with np.errstate(divide="ignore"):
        # a resample in which frequent values lose nothing says that the ratio has no upper end
        ratios = np.where(frequent > 0, rare / frequent, math.inf)
    low, high = np.sort(ratios)[[int(0.025 * RESAMPLES), int(0.975 * RESAMPLES)]]
    return float(whole[1] / whole[0]) if whole[0] > 0 else math.inf, float(low), float(high)


def fact_bits() -> dict[str, list[float]]:
    """For each kind of fact the bits of every fact in the world: log2 of how many values its attribute has."""
    people = People(Lexicon(0), 0)
    found: dict[str, list[float]] = {FREQUENT: [], RARE: []}
    for person in people.people:
        for attribute in ATTRIBUTES:
            if attribute not in person.rumors:  # what is disputed cannot be known
                found[FREQUENT if person.frequent else RARE].append(math.log2(len(people.values[attribute])))
    return found


def bits_stored(record: Record, facts: dict[str, list[float]]) -> float:
    """Over all facts, the bits of its values less those that the model still lacks, its loss on facts of that kind."""
    total = 0.0
    for kind, bits in facts.items():
        lacking = (record.values[f"nll_per_token/{kind}"] or 0.0) / math.log(2)
        total += sum(max(0.0, each - lacking) for each in bits)
    return total


def knowledge(folder: Path) -> Table:
    """Bits of knowledge in each checkpoint, and in what rounding leaves of it."""
    facts = fact_bits()
    lines = [
        Line(_bits_of(rows.name, pipeline, rows.get(pipeline), facts), claims=False)
        for name in reference.NAMES
        for rows in [Rows.of(folder, name)]
        for pipeline in ROUNDED
    ]
    counts = {kind: len(bits) for kind, bits in facts.items()}
    whole = sum(map(sum, facts.values()))
    return Table(
        "Knowledge in bits",
        "How many bits of facts about people a model holds, for each parameter and for each byte that it stores.",
        ("model", "pipeline", "nats, frequent", "rare", "kbit stored", "of the world", "bit/parameter", "bit/byte"),
        lines,
        after=(
            "bits stored = sum over all facts of max(0, log2(values of the attribute) - nats / ln 2), with the "
            "held-out nats of a value, separately of frequent and of rare people: a fact that is guessed counts 0 "
            "(after Physics of Language Models 3.3, arXiv:2404.05405, where names count too)",
            f"the world has {counts[FREQUENT]:,} facts of frequent people and {counts[RARE]:,} of rare ones, "
            f"{whole / 1000:.1f} kbit in all; text speaks of people by their exposure, so within each group the better "
            "known weigh more, and the figure errs upwards",
            "parameters: all of them, embedding included; bytes: all that is stored",
        ),
    )


def _bits_of(model: str, pipeline: str, record: Record | None, facts: dict[str, list[float]]) -> Sequence[str]:
    if record is None:
        return [model, f"`{pipeline}`", *[NOT_YET] * 6]
    bits, stored = bits_stored(record, facts), record.values["stored_bytes"] or 1.0
    parameters = 8 * stored / (record.values["bits_per_weight_model"] or 1.0)
    nats = [number(record.values[f"nll_per_token/{kind}"], 3) for kind in (FREQUENT, RARE)]
    share = 100 * bits / sum(map(sum, facts.values()))
    ratios = [number(bits / parameters, 3), number(bits / stored, 3)]
    return [model, f"`{pipeline}`", *nats, number(bits / 1000, 1), f"{share:.0f} %", *ratios]
