"""Why a technique can lose more than a plain one: what it makes small beside its outputs' error and the loss.

One kind of matrix is compressed at a time, so that nothing can come from errors that add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import results
from effbench.evidence.table import NOT_YET, Line, Table, errors_from, number
from effbench.measure.statistics import paired_difference

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.suite import Suite
    from effbench.technique import System
    from effbench.toolbox.inputs import Inputs

TOGETHER = "all together"
WINDOWS, SAMPLES = 48, 64
ERRORS = 3.0

Importance = Callable[["System", "Tensor", dict[str, "Inputs"]], dict[str, "Tensor"]]
"""From a system, calibration tokens (sequences, length) and each matrix's inputs: what an input counts, (in,)."""


@dataclass(frozen=True)
class Experiment:
    """Two pipelines of one technique each, at several settings.

    record: the file's name.
    pairs: by what a setting is called, the plain pipeline and the weighted one.
    importance: what the weighted one multiplies squared errors with.
    fed: whether the weighted one is given that in place of inputs.
    """

    record: str
    pairs: dict[str, tuple[str, str]]
    importance: Importance
    fed: bool = False

    def measure(self, folder: Path, asked: Suite, windows: int = WINDOWS, samples: int = SAMPLES) -> None:
        """Write all of it to the suite's `folder`, unless it is there already for the same weights and texts."""
        given = results.inputs(asked.model, asked.text, asked.calibration)
        of = {name: given[name] for name in ("weights", "texts")}
        path = folder / self.record
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("inputs") == of:
            return
        text = json.dumps({"inputs": of, **self._found(asked, windows, samples)})
        path.write_text(text.replace("}, ", "},\n") + "\n", encoding="utf-8")

    def _found(self, asked: Suite, limit: int, samples: int) -> dict[str, Any]:
        import torch

        from effbench import models
        from effbench.jobs.row import data_for
        from effbench.measure.quality import score
        from effbench.registry import parse

        torch.set_num_threads(1)
        system = models.load(asked.model, "float32")
        data = data_for(asked, system)
        assert data.source is not None
        windows = data.source.evaluation(data.context, limit)
        ids = data.calibration(samples)
        weights, inputs = _seen(system, ids)
        importance = self.importance(system, ids, inputs)
        kinds: dict[str, list[str]] = {}
        for name in weights:
            kinds.setdefault(name.rpartition(".")[2], []).append(name)
        dense = score(system, windows)
        rows: dict[str, dict[str, Any]] = {}
        for setting, pair in self.pairs.items():
            for place, pipeline in enumerate(pair):
                technique: Any = parse(pipeline)[0]
                made: dict[str, Tensor] = {}
                for name, (_, weight) in weights.items():
                    read = importance[name] if place and self.fed else inputs[name]
                    made[name] = _computed(technique, weight, read)
                for kind, names in {**kinds, TOGETHER: list(weights)}.items():
                    for name in names:
                        weights[name][0].weight.data.copy_(made[name])
                    errors = [(made[name] - weights[name][1]).double() for name in names]
                    rows[f"{setting} {kind} {'weighted' if place else 'plain'}"] = {
                        "measure": sum(
                            float((error.square() * importance[name]).sum())
                            for name, error in zip(names, errors, strict=True)
                        ),
                        "outputs": sum(
                            _power(error, inputs[name]) / _power(weights[name][1].double(), inputs[name])
                            for name, error in zip(names, errors, strict=True)
                        ),
                        "nats": [round(value, 3) for value in score(system, windows).nats],
                    }
                    for name in names:
                        weights[name][0].weight.data.copy_(weights[name][1])
        return {"tokens": dense.tokens, "dense": [round(value, 3) for value in dense.nats], "rows": rows}

    def lines(self, folder: Path, names: Sequence[str]) -> list[Line]:
        """For each model, setting and kind of matrix: both measures, and what becomes of the loss."""
        found = []
        for name in names:
            path = folder / name / self.record
            if not path.is_file():
                found.append(Line([name, *[NOT_YET] * 8], claims=False))
                continue
            known = json.loads(path.read_text(encoding="utf-8"))
            for setting in self.pairs:
                ends = f"{setting} ", " plain"
                kinds = [row for row in known["rows"] if row.startswith(ends[0]) and row.endswith(ends[1])]
                for kind in (row.removeprefix(ends[0]).removesuffix(ends[1]) for row in kinds):
                    cells = [name, setting, kind, *self._cells(known, setting, kind)]
                    found.append(Line(cells, claims=False))
        return found

    def _cells(self, known: dict[str, Any], setting: str, kind: str) -> list[str]:
        plain, weighted = (known["rows"][f"{setting} {kind} {which}"] for which in ("plain", "weighted"))
        pairs = (
            (plain["nats"], known["dense"]),
            (weighted["nats"], known["dense"]),
            (weighted["nats"], plain["nats"]),
        )
        figures = [paired_difference(one, other, known["tokens"]) for one, other in pairs]
        z = errors_from(*figures[2])
        names = [pipeline.partition(":")[0] for pipeline in self.pairs[setting]]
        better = names[1] if z < -ERRORS else names[0] if z > ERRORS else "neither"
        return [
            number(weighted["measure"] / plain["measure"], 2),
            number(weighted["outputs"] / plain["outputs"], 2),
            *(number(value, 4, error, True) for value, error in figures),
            better,
        ]

    def table(self, title: str, says: str, measure: str, folder: Path, models: Sequence[str], why: str) -> Table:
        """All lines under a title; `measure` is what the weighted technique makes small, and `why` what is seen."""
        plain, weighted = (pipeline.partition(":")[0] for pipeline in next(iter(self.pairs.values())))
        return Table(
            title,
            says,
            (
                "model",
                "at",
                "matrices",
                f"{measure} / {plain}'s",
                f"outputs' error / {plain}'s",
                f"Δnats, {plain}",
                f"Δnats, {weighted}",
                f"{weighted} above {plain}",
                "better",
            ),
            self.lines(folder, models),
            after=(
                why,
                f"in float32, the matrices of one kind of all blocks at a time, on the inputs of the dense model; "
                f"outputs' error: on calibration text, relative, the sum over matrices; {WINDOWS} windows, ± one "
                f"standard error, paired; better: by {ERRORS:.0f} of them",
            ),
        )


def _seen(system: System, ids: Tensor) -> tuple[dict[str, tuple[Any, Tensor]], dict[str, Inputs]]:
    """Each matrix with a copy of its weight (out, in), and what it is fed in the dense model."""
    from effbench.toolbox.walk import matrices, walk

    weights: dict[str, tuple[Any, Tensor]] = {
        name: (linear, linear.weight.detach().clone()) for name, linear in matrices(system.model)
    }
    inputs: dict[str, Inputs] = {}
    for block in walk(system.model, ids):
        found = block.inputs(block.matrices(), only=("gram", "square_sum"), advance=True)
        inputs |= {f"{block.name}.{name}": read for name, read in found.items()}
    return weights, inputs


def _computed(technique: Any, weight: Tensor, read: Any) -> Tensor:
    """What a technique makes of a matrix (out, in), as the matrix that it computes with."""
    import torch
    from torch import nn

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    with torch.no_grad():
        made: Tensor = technique.layer(linear, read)(torch.eye(weight.shape[1])).T
    return made


def _power(weight: Tensor, inputs: Inputs) -> float:
    """The squared outputs of a matrix (out, in) on its inputs, in float64."""
    return float((weight @ inputs.gram.double() * weight).sum())
