"""Why FWSVD can lose more than plain SVD: it keeps what its weights say matters, and the loss is of another opinion.

One kind of matrix is cut at a time, so that nothing can come from errors that add up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number
from effbench.measure.statistics import paired_difference

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.suite import Suite

RECORD = "fisher.json"
KEEPS = (0.8, 0.6)
TOGETHER = "all together"
WINDOWS, SAMPLES = 48, 64
ERRORS = 3.0


def measure(folder: Path, asked: Suite) -> None:
    """Write nats by window, and what FWSVD looks at, to the suite's `folder`, unless they are there already."""
    if (folder / RECORD).is_file():
        return
    import torch

    from effbench import models
    from effbench.jobs.row import data_for
    from effbench.measure.quality import score
    from effbench.registry import get
    from effbench.toolbox.fisher import input_importance
    from effbench.toolbox.walk import matrices

    torch.set_num_threads(1)
    system = models.load(asked.model, "float32")
    data = data_for(asked, system)
    assert data.source is not None
    windows = data.source.evaluation(data.context, WINDOWS)
    dense = score(system, windows)
    weights = {name: (linear, linear.weight.detach().clone()) for name, linear in matrices(system.model)}
    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    importance = input_importance(system.model, data.calibration(SAMPLES))
    rows: dict[str, dict[str, Any]] = {}
    for keep in KEEPS:
        for technique, inputs in (("svd", dict.fromkeys(weights)), ("fwsvd", importance)):
            method: Any = get(technique)
            cut: dict[str, Tensor] = {}
            for name, (linear, _) in weights.items():
                layer = method(keep=keep).layer(linear, inputs[name])
                cut[name] = (layer.second.weight @ layer.first.weight).detach()
            for kind, names in {**kinds, TOGETHER: list(weights)}.items():
                for name in names:
                    weights[name][0].weight.data.copy_(cut[name])
                missed = sum(
                    float(((cut[name] - weights[name][1]).square() * importance[name]).sum()) for name in names
                )
                nats = [round(value, 3) for value in score(system, windows).nats]
                rows[f"{technique} {keep} {kind}"] = {"missed": missed, "nats": nats}
                for name in names:
                    weights[name][0].weight.data.copy_(weights[name][1])
    found = {"tokens": dense.tokens, "dense": [round(value, 3) for value in dense.nats], "rows": rows}
    (folder / RECORD).write_text(json.dumps(found).replace("}, ", "},\n") + "\n", encoding="utf-8")


def table(folder: Path, names: Sequence[str]) -> Table:
    """For each model, rank and kind of matrix: what FWSVD makes small, and what becomes of the loss."""
    lines = []
    for name in names:
        path = folder / name / RECORD
        if not path.is_file():
            lines.append(Line([name, *[NOT_YET] * 7], claims=False))
            continue
        known = json.loads(path.read_text(encoding="utf-8"))
        for keep in KEEPS:
            prefix = f"svd {keep} "
            for kind in (row.removeprefix(prefix) for row in known["rows"] if row.startswith(prefix)):
                lines.append(Line([name, f"{keep:g}", kind, *_cells(known, keep, kind)], claims=False))
    return Table(
        "What FWSVD makes small, and the loss",
        "FWSVD always has less of the error that it minimises, squared errors times the Fisher information of their "
        "inputs. The loss does not always follow.",
        (
            "model",
            "keep",
            "matrices cut",
            "Fisher error / svd's",
            "Δnats, svd",
            "Δnats, fwsvd",
            "fwsvd above svd",
            "better",
        ),
        lines,
        after=(
            "Fisher information knows nothing of inputs that go together, and the errors of one row are added up by "
            "those; `svd_llm`, which knows them, loses less than both in the first table",
            f"in float32, the matrices of one kind of all blocks at a time; {WINDOWS} windows, ± one standard error, "
            f"paired; better: by {ERRORS:.0f} of them",
        ),
    )


def _cells(known: dict[str, Any], keep: float, kind: str) -> list[str]:
    plain, weighted = (known["rows"][f"{technique} {keep} {kind}"] for technique in ("svd", "fwsvd"))
    pairs = (
        (plain["nats"], known["dense"]),
        (weighted["nats"], known["dense"]),
        (weighted["nats"], plain["nats"]),
    )
    figures = [paired_difference(one, other, known["tokens"]) for one, other in pairs]
    z = errors_from(*figures[2])
    better = "fwsvd" if z < -ERRORS else "svd" if z > ERRORS else "neither"
    return [
        number(weighted["missed"] / plain["missed"], 2),
        *(number(value, 4, error, True) for value, error in figures),
        better,
    ]
