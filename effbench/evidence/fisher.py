"""Why FWSVD can lose more than plain SVD: its weights are of the loss's slope where nothing is cut off yet.

Each pair of matrices is compared part of the way from the dense weights to the cut ones. If FWSVD adds less at first
and more at the end, its Fisher information is right and does not reach so far.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number
from effbench.measure.statistics import paired_difference

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.suite import Suite
    from effbench.technique import System

RECORD = "fisher.json"
KEEPS = (0.8, 0.6)
PARTS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Shares of the way to the cut matrices, all of them at once."""
WINDOWS = 48
ERRORS = 3.0


def measure(folder: Path, asked: Suite) -> None:
    """Write nats by window to the suite's `folder`, unless they are there already."""
    if (folder / RECORD).is_file():
        return
    import torch

    from effbench import models
    from effbench.jobs.row import data_for
    from effbench.measure.quality import score
    from effbench.registry import parse
    from effbench.toolbox.walk import matrices

    torch.set_num_threads(1)

    def cut(name: str, keep: float) -> dict[str, Tensor]:
        system = models.load(asked.model, "float32")
        wanted = [name for name, _ in matrices(system.model)]
        (technique,) = parse(f"{name}:keep={keep}")
        system = technique.apply(system, data_for(asked, system))
        return {each: _product(system, each) for each in wanted}

    system = models.load(asked.model, "float32")
    data = data_for(asked, system)
    assert data.source is not None
    windows = data.source.evaluation(data.context, WINDOWS)
    dense = score(system, windows)
    found: dict[str, list[float]] = {"tokens": list(map(float, dense.tokens)), "dense": dense.nats}
    weights = {name: (linear.weight, linear.weight.detach().clone()) for name, linear in matrices(system.model)}
    for keep in KEEPS:
        for name in ("svd", "fwsvd"):
            ends = cut(name, keep)
            for part in PARTS:
                for each, (weight, start) in weights.items():
                    weight.data.copy_(start + part * (ends[each] - start))
                found[f"{name}:keep={keep} {part}"] = score(system, windows).nats
    short = {name: [round(value, 4) for value in values] for name, values in found.items()}
    (folder / RECORD).write_text(json.dumps(short).replace("], ", "],\n") + "\n", encoding="utf-8")


def _product(system: System, name: str) -> Tensor:
    """The matrix (out, in) that a factored layer stands for."""
    import torch

    layer = system.model.get_submodule(name)
    with torch.no_grad():
        product: Tensor = layer.second.weight @ layer.first.weight  # type: ignore[operator, union-attr]
    return product


def table(folder: Path, names: Sequence[str]) -> Table:
    """For each model and rank, what both add on the way."""
    lines = []
    for name in names:
        path = folder / name / RECORD
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        for keep in KEEPS:
            for part in PARTS:
                about = [name, f"{keep:g}", f"{100 * part:g} %"]
                if known is None:
                    lines.append(Line([*about, *[NOT_YET] * 4], claims=False))
                    continue
                rows = [known[f"{each}:keep={keep} {part}"] for each in ("svd", "fwsvd")]
                pairs = [(row, known["dense"]) for row in rows] + [(rows[1], rows[0])]
                figures = [paired_difference(one, other, known["tokens"]) for one, other in pairs]
                z = errors_from(*figures[2])
                better = "fwsvd" if z < -ERRORS else "svd" if z > ERRORS else "neither"
                cells = [number(value, 5, error, True) for value, error in figures]
                lines.append(Line([*about, *cells, better], claims=False))
    return Table(
        "How far Fisher information reaches",
        "Nats that plain SVD and FWSVD add on the way from the dense matrices to the cut ones.",
        ("model", "keep", "of the way", "Δnats, svd", "Δnats, fwsvd", "fwsvd above svd", "better"),
        lines,
        after=(
            f"all matrices are moved at once, in float32; {WINDOWS} windows, ± one standard error, paired; better: by "
            f"{ERRORS:.0f} of them",
        ),
    )
