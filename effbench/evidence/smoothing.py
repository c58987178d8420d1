"""How far outputs are off by SmoothQuant's alpha: which part weights have in it, and which part inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import results
from effbench.evidence.table import NOT_YET, Line, Table, number

if TYPE_CHECKING:
    from effbench.suite import Suite

RECORD = "smoothing.json"
ALPHAS = tuple(step / 8 for step in range(9))
ENDS = ("0", "1")
SAMPLES = 16
ROUNDED = {"weights": "weights", "activations": "inputs", "both": "both"}
"""What is rounded, and what the table calls it."""


def measure(folder: Path, asked: Suite) -> None:
    """Write relative errors to the suite's `folder`, unless they are there already for the same weights and texts."""
    given = results.inputs(asked.model, asked.text, asked.calibration)
    of = {name: given[name] for name in ("weights", "texts")}
    path = folder / RECORD
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("inputs") == of:
        return
    path.write_text(json.dumps({"inputs": of, **_errors(asked)}, indent=1) + "\n", encoding="utf-8")


def _errors(asked: Suite) -> dict[str, Any]:
    """By what is rounded and alpha, the squared error of outputs over their squares: the mean over matrices."""
    import torch

    from effbench import models
    from effbench.jobs.row import data_for
    from effbench.registry import get
    from effbench.toolbox.folding import find_folds
    from effbench.toolbox.int8 import Int8Linear
    from effbench.toolbox.walk import as_linear, walk

    torch.set_num_threads(1)
    method: Any = get("smoothquant")
    system = models.load(asked.model, "float32")
    system.model.requires_grad_(False)
    ids = data_for(asked, system).calibration(SAMPLES)
    found: dict[str, dict[str, list[float]]] = {kind: {f"{alpha:g}": [] for alpha in ALPHAS} for kind in ROUNDED}
    for block in walk(system.model, ids):
        readers = [name for place in find_folds(block, 1) if place.rows is None for name in place.readers]
        inputs = block.inputs(readers, advance=True)
        for name in readers:
            linear, x = as_linear(block.module.get_submodule(name)), torch.cat(inputs[name].chunks).float()
            exact = x @ linear.weight.T
            for alpha in ALPHAS:
                made: Any = method(alpha=alpha, scale_dtype="float32").layer(linear, inputs[name])
                inner, scaled = made.inner, x / made.scales
                assert isinstance(inner, Int8Linear)
                weight = inner.codes.float() * inner.scales[:, None]
                steps = scaled.abs().amax(1, keepdim=True) / 127
                rounded = (scaled / steps).round() * steps
                whole = linear.weight * made.scales
                for kind, output in zip(
                    ROUNDED, (scaled @ weight.T, rounded @ whole.T, rounded @ weight.T), strict=True
                ):
                    error = float((output - exact).square().sum() / exact.square().sum())
                    found[kind][f"{alpha:g}"].append(error)
    return {kind: {alpha: sum(row) / len(row) for alpha, row in rows.items()} for kind, rows in found.items()}


def table(folder: Path, name: str) -> Table:
    """All alphas of one model."""
    path = folder / name / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    lines = []
    for alpha in (f"{alpha:g}" for alpha in ALPHAS):
        if known is None:
            lines.append(Line([alpha, *[NOT_YET] * len(ROUNDED)], claims=alpha in ENDS))
            continue
        cells = []
        for kind in ROUNDED:
            figure = number(1e6 * known[kind][alpha], 1)
            cells.append(f"**{figure}**" if known[kind][alpha] == min(known[kind].values()) else figure)
        both = known["both"]
        lines.append(Line([alpha, *cells], both[alpha] > min(both.values()), alpha in ENDS))
    return Table(
        "What SmoothQuant rounds away",
        "The squared error of outputs over their squares, in millionths, with weights rounded to 8 bits, inputs "
        "rounded to 8 bits a token, and both; the least is bold. With both it is at neither end.",
        ("alpha", *(f"{name} rounded" for name in ROUNDED.values())),
        lines,
        after=(
            f"{name}: the mean over all matrices behind norms, each by itself, in float32 on {SAMPLES} sequences of "
            "calibration text; nats of 256 windows, known to 0.0001, cannot tell the better half of these apart",
        ),
    )
