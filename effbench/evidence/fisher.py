"""Why FWSVD can lose more than plain SVD: it keeps what its weights say matters, and the loss is of another opinion."""

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


def _information(system: System, ids: Tensor, inputs: dict[str, Inputs]) -> dict[str, Tensor]:
    from effbench.toolbox.fisher import input_importance

    return input_importance(system.model, ids)


EXPERIMENT = Experiment(
    "fisher.json",
    {f"keep {keep}": (f"svd:keep={keep}", f"fwsvd:keep={keep}") for keep in (0.8, 0.6)},
    _information,
    fed=True,
)


def table(folder: Path, names: Sequence[str]) -> Table:
    """For each model, rank and kind of matrix: what FWSVD makes small, and what becomes of the loss."""
    return EXPERIMENT.table(
        "What FWSVD makes small, and the loss",
        "FWSVD always has less of the error that it minimises, squared errors times the Fisher information of their "
        "inputs. The loss does not always follow.",
        "Fisher error",
        folder,
        names,
        "Fisher information knows nothing of inputs that go together, nor of errors made elsewhere. On the reference "
        "family FWSVD is no worse where outputs, too, are nearer (gate, up, down), and now better, now worse for "
        "`v_proj` and `o_proj`, whose cut is the dearest; cut all together, errors add up to more than plain SVD's. "
        "On TinyStories outputs of most kinds are further off than with plain SVD. `svd_llm`, which knows inputs that "
        "go together, loses less than both in the first table",
    )
