"""Why Wanda can lose more than magnitude pruning: what it makes small, beside its outputs' error and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effbench.evidence.proxies import Experiment
from effbench.evidence.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.technique import System
    from effbench.toolbox.inputs import Inputs


def squares(system: System, ids: Tensor, inputs: dict[str, Inputs]) -> dict[str, Tensor]:
    """The squared norm of each input of each matrix."""
    return {name: read.square_sum for name, read in inputs.items()}


EXPERIMENT = Experiment(
    "input_norms.json",
    {
        "2:4": ("magnitude:pattern=2:4", "wanda:pattern=2:4"),
        "50 %, mixed": ("magnitude", "wanda"),
        "50 %, matrix": ("magnitude", "wanda:compare=matrix"),
    },
    squares,
)


def table(folder: Path, names: Sequence[str]) -> Table:
    """For each model, pattern and kind of matrix: what Wanda makes small, and what becomes of the loss."""
    return EXPERIMENT.table(
        "What Wanda makes small, and the loss",
        "Squared weights times the squared norm of their inputs are what Wanda removes least of, where both compare "
        "within the same weights. Outputs and loss do not always follow.",
        "Wanda's error",
        folder,
        names,
        "mixed: Wanda within rows and magnitude over a matrix, as released. So gate and up projections of ref-3m keep "
        "as many weights in rows that matter little as in others: their outputs are four times as far off, and that is "
        "where Wanda loses; over a matrix it does not. At 2:4 outputs of every kind are nearer with Wanda; `o_proj` of "
        "ref-3m, and gate and up projections of TinyStories, cost more nats all the same: not all outputs count alike",
    )
