"""How the family was trained: sizes, seeds, losses, and the power law that they follow.

The law is of longer runs than those that ship, and only their figures are kept. 1m and 3m ship as they were before
their sums came near to always right, since a task has to leave room. The sizes of the law have not read the same: it is
one of size alone, and how many tokens that takes is not the same for all. 70k learns facts in some runs and in others
hardly, so that its loss depends on the seed more than on anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effbench import reference
from effbench.evidence.rows import Rows
from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number
from effbench.measure.statistics import mean_and_stderr

SIZES, SEEDS = 6, 3
LEAST, MOST, ABOVE_CHANCE = 0.55, 0.97, 10.0
"""Of a task: neither out of reach nor done, and so many standard errors above guessing."""
ITEMS = 1000
"""Items of each task that the trainer asks."""
APART = 5.0
"""Paired standard errors between neighbouring sizes."""
RESIDUAL = 0.005
"""Nats that a size may lie off the fitted law."""


@dataclass(frozen=True)
class Run:
    """One training record: what `effbench.reference.train` wrote beside its checkpoint."""

    size: str
    seed: int
    tokens: int
    seconds: float
    device: str
    nats: float
    nats_by_kind: dict[str, float]
    accuracy: dict[str, float]
    nats_by_row: list[float] = field(default_factory=list)
    parameters: int = 0
    ships: bool = False

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"ref-{self.size}" if self.ships else f"{self.size}, seed {self.seed}"


def runs(folder: Path) -> list[Run]:
    """All training records, smallest size first: of the shipped checkpoints, then those in `folder`/training."""
    from effbench.reference.train import SIZES as shapes  # needs torch, which nothing else here does

    shipped = [reference.folder(name) / "training.json" for name in reference.NAMES]
    found = []
    for path in [*shipped, *sorted((folder / "training").glob("*.json"))]:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content = {key: value for key, value in content.items() if key in Run.__dataclass_fields__}
        parameters = block_parameters(shapes[content["size"]])
        found.append(Run(**{**content, "parameters": parameters, "ships": path in shipped}))
    return sorted(found, key=lambda run: (not run.ships, run.parameters, run.tokens, run.seed))


def block_parameters(shape: Any) -> int:
    """Parameters of all blocks: two query heads share a key head, the feed-forward part is gated, two norms."""
    width = shape.width
    return int(shape.layers * (3 * width**2 + 3 * width * shape.feedforward + 2 * width))


def tables(folder: Path) -> list[Table]:
    """All about training."""
    found = runs(folder)
    return [losses(found), accuracies(found, folder), _tasks(folder), scaling(found)]


def losses(found: Sequence[Run]) -> Table:
    """Every training record."""
    kinds = list(found[0].nats_by_kind)
    lines = [
        Line(
            [
                run.name, f"{run.parameters:,}", f"{run.tokens / 1e6:.1f}",
                f"{run.seconds / 60:.0f}", number(run.nats, 4),
                *(number(run.nats_by_kind[kind], 4) for kind in kinds),
            ],
            claims=False,
        )
        for run in found
    ]  # fmt: skip
    devices = ", ".join(sorted({run.device for run in found}))
    return Table(
        "Training runs",
        "Held-out nats per token after training, in all and by kind of token.",
        ("trained", "parameters", "tokens (M)", "minutes", "nats", *kinds),
        lines,
        after=(
            f"parameters are those of the blocks; trained on: {devices}",
            "`python -m effbench.reference.train SIZE --seed S --tokens N --out FOLDER` trains any of them again",
        ),
    )


def accuracies(found: Sequence[Run], folder: Path) -> Table:
    """Every task for every training record, and what guessing gives."""
    tasks = list(found[0].accuracy)
    lines = [Line([run.name, *(_share(run.accuracy[task]) for task in tasks)], claims=False) for run in found]
    dense = Rows.of(folder, "ref-1m-tasks").get("dense")
    chances = [number(dense.values[f"accuracy_chance/ref_{task}"], 3) if dense else NOT_YET for task in tasks]
    return Table(
        "Accuracy after training",
        "Which tasks a size has learned, asked by the trainer itself.",
        ("trained", *(task.replace("_", " ") for task in tasks)),
        [*lines, Line(["guessing", *chances], claims=False)],
        after=(f"{ITEMS:,} items a task, ± one standard error",),
    )


def _share(right: float) -> str:
    return number(right, 3, math.sqrt(right * (1 - right) / ITEMS))


def _tasks(folder: Path) -> Table:
    lines = []
    for name in ("ref-1m", "ref-3m"):
        dense = Rows.of(folder, f"{name}-tasks").get("dense")
        if dense is None:
            lines.append(Line([name, *[NOT_YET] * 4]))
            continue
        for sample, items in dense.samples.items():
            task = sample.partition("correct/")[2]
            if task:
                share, error = mean_and_stderr(items)
                chance = dense.values[f"accuracy_chance/{task}"] or 0.0
                z = errors_from(share - chance, error)
                cells = [name, task, number(share, 3, error), number(chance, 3), f"{z:.0f}"]
                lines.append(Line(cells, LEAST <= share <= MOST and z >= ABOVE_CHANCE))
    return Table(
        "Tasks",
        f"Each task is answered right between {LEAST} and {MOST} of the time, and at least {ABOVE_CHANCE:.0f} standard "
        "errors above guessing.",
        ("model", "task", "accuracy", "guessing", "standard errors above"),
        lines,
        after=("the shipped checkpoints in bfloat16, 1,000 items a task",),
    )


def law(parameters: Sequence[float], nats: Sequence[float]) -> tuple[float, float, float]:
    """E, A, alpha of nats = E + A * (parameters / the smallest)^-alpha, by least squares."""
    from scipy.optimize import curve_fit

    scaled = np.asarray(parameters, float) / min(parameters)

    def loss(size: np.ndarray, offset: float, height: float, alpha: float) -> np.ndarray:
        return offset + height * size**-alpha

    least, most = min(nats), max(nats)
    start = (least - 0.1 * (most - least), 1.1 * (most - least), 0.5)
    fitted, _ = curve_fit(loss, scaled, np.asarray(nats, float), p0=start, maxfev=100_000)
    return float(fitted[0]), float(fitted[1]), float(fitted[2])


def scaling(found: Sequence[Run]) -> Table:
    """What size is worth: the means over seeds, from one size to the next and against the law."""
    sizes = _longest(found)
    means, laid, (offset, height, alpha) = _laid(sizes)
    lines = []
    for place, (some, mean, fitted) in enumerate(zip(sizes, means, laid, strict=True)):
        count = some[0].parameters
        step = _step(sizes[place - 1], some) if place else None
        z = errors_from(*step) if step else math.nan
        spread = max(run.nats for run in some) - min(run.nats for run in some)
        cells = [some[0].size, f"{count:,}", f"{some[0].tokens / 1e6:.0f}", str(len(some)), number(mean, 4)]
        cells.append(number(spread, 4) if some[1:] else NOT_YET)
        cells += [number(step[0], 4, step[1], True), f"{z:.1f}"] if step else [NOT_YET] * 2
        cells += [number(fitted, 4), number(mean - fitted, 4, signed=True)]
        is_known = math.isfinite(fitted) and len(some) >= SEEDS and (step is not None or place == 0)
        holds = abs(mean - fitted) < RESIDUAL and (place == 0 or z <= -APART)
        lines.append(Line(cells, holds if is_known else None))
    after = [
        "to the smaller: ± one standard error, paired over the same held-out rows",
        f"of each size the longest runs of {SEEDS} seeds; all others stand above",
    ]
    if (even := _even(found)) is not None:
        after.append(even)
    if math.isfinite(offset):
        term = f"{offset:.3f} + {height:.3f} (N / {sizes[0][0].parameters:,})^-{alpha:.3f}"
        after.insert(0, f"L(N) = {term}, N the parameters of the blocks; three figures fitted to {len(sizes)} means")
    return Table(
        "Scaling law",
        f"Loss falls strictly with size, neighbours lie at least {APART:.0f} paired standard errors apart, and one "
        f"power law with an offset fits {SIZES} sizes within {RESIDUAL} nats; means over {SEEDS} seeds.",
        (
            "size", "parameters", "tokens (M)", "seeds", "nats", "spread of seeds", "to the smaller", "z", "fitted",
            "residual",
        ),
        lines,
        after=tuple(after),
    )  # fmt: skip


def _laid(sizes: Sequence[Sequence[Run]]) -> tuple[list[float], list[float], tuple[float, float, float]]:
    """The means over seeds, where the law has them, and its figures; of too few sizes there is none but NaN."""
    counts = [some[0].parameters for some in sizes]
    means = [sum(run.nats for run in some) / len(some) for some in sizes]
    offset, height, alpha = law(counts, means) if len(sizes) >= SIZES else (math.nan,) * 3
    return means, [offset + height * (count / counts[0]) ** -alpha for count in counts], (offset, height, alpha)


def _even(found: Sequence[Run]) -> str | None:
    """What the law leaves where all sizes have read the same; `None` where no length comes in enough seeds of all."""
    for tokens in sorted({run.tokens for run in found}, reverse=True):
        sizes = _longest([run for run in found if run.tokens == tokens])
        if len(sizes) >= SIZES and all(len(some) >= SEEDS for some in sizes):
            means, laid, _ = _laid(sizes)
            most = max(abs(mean - fitted) for mean, fitted in zip(means, laid, strict=True))
            return f"on {tokens / 1e6:.0f}M tokens each a law leaves up to {most:.4f} nats"
    return None


def _longest(found: Sequence[Run]) -> list[list[Run]]:
    """Of each size the longest runs that come in enough seeds, or else the longest; smallest size first."""
    groups: dict[int, dict[int, list[Run]]] = {}
    for run in found:
        groups.setdefault(run.parameters, {}).setdefault(run.tokens, []).append(run)
    return [max(lengths.values(), key=_seeds_then_tokens) for _, lengths in sorted(groups.items())]


def _seeds_then_tokens(some: Sequence[Run]) -> tuple[bool, int]:
    return len(some) >= SEEDS, some[0].tokens


def _step(smaller: Sequence[Run], larger: Sequence[Run]) -> tuple[float, float] | None:
    """Nats of the larger above the smaller, paired over the rows of held-out text, which have one length."""
    rows = {len(run.nats_by_row) for run in (*smaller, *larger)}
    if len(rows) > 1 or 0 in rows:
        return None
    mine, theirs = (np.mean([run.nats_by_row for run in some], 0) for some in (larger, smaller))
    return mean_and_stderr(list(mine - theirs))
