"""What 8-bit weights and inputs cost, a kind of matrix at a time: SmoothQuant rounds the inputs of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import results
from effbench.evidence.table import NOT_YET, Line, Table, number
from effbench.measure.statistics import paired_difference

if TYPE_CHECKING:
    from effbench.suite import Suite

RECORD = "eight_bits.json"
WINDOWS = 400
WEIGHTS, BOTH, TOGETHER = "weights", "weights and inputs", "all together"


def measure(folder: Path, asked: Suite, limit: int = WINDOWS) -> None:
    """Write nats by window to the suite's `folder`, unless they are there already for the same weights and texts."""
    given = results.inputs(asked.model, asked.text, asked.calibration)
    of = {name: given[name] for name in ("weights", "texts")}
    path = folder / RECORD
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("inputs") == of:
        return
    text = json.dumps({"inputs": of, **_nats(asked, limit)})
    path.write_text(text.replace("], ", "],\n") + "\n", encoding="utf-8")


def _nats(asked: Suite, limit: int) -> dict[str, Any]:
    import torch

    from effbench import models
    from effbench.jobs.row import data_for
    from effbench.measure.quality import score
    from effbench.registry import parse
    from effbench.toolbox.int8 import Int8Linear
    from effbench.toolbox.walk import matrices, replace_module

    torch.set_num_threads(1)
    system = models.load(asked.model, asked.dtype)
    data = data_for(asked, system)
    assert data.source is not None
    windows = data.source.evaluation(data.context, limit)
    plain: Any = parse("rtn:bits=8")[0]
    kinds: dict[str, list[str]] = {}
    for name, _ in matrices(system.model):
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    dense, rows = score(system, windows), {}
    for kind, names in {**kinds, TOGETHER: [name for some in kinds.values() for name in some]}.items():
        for rounded in (WEIGHTS, BOTH):
            linears: dict[str, Any] = {name: system.model.get_submodule(name) for name in names}
            for name, linear in linears.items():
                new = plain.layer(linear, None) if rounded == WEIGHTS else Int8Linear.pack(linear)
                replace_module(system.model, name, new)
            rows[f"{kind} {rounded}"] = [round(value, 3) for value in score(system, windows).nats]
            for name, linear in linears.items():
                replace_module(system.model, name, linear)
    return {"tokens": dense.tokens, "dense": [round(value, 3) for value in dense.nats], **rows}


def table(folder: Path, name: str) -> Table:
    """All kinds of matrices of one model."""
    path = folder / name / RECORD
    lines = []
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        for kind in (row.removesuffix(f" {WEIGHTS}") for row in known if row.endswith(f" {WEIGHTS}")):
            figures = [
                paired_difference(known[f"{kind} {rounded}"], known["dense"], known["tokens"])
                for rounded in (WEIGHTS, BOTH)
            ]
            lines.append(Line([kind, *(number(value, 5, error, True) for value, error in figures)], claims=False))
    return Table(
        "What 8 bits cost, and where",
        "Nats per token above dense with the matrices of one kind in 8 bits, without smoothing.",
        ("matrices", WEIGHTS, BOTH),
        lines or [Line([NOT_YET] * 3, claims=False)],
        after=(
            f"{name}: {WINDOWS} windows, ± one standard error, paired; SmoothQuant smooths what norms feed, and rounds "
            "the inputs of `o_proj` and `down_proj` as they are, like the released code",
        ),
    )
