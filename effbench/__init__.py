"""effbench: one honest row per compressed language model.

    frame = effbench.run("ref-1m", ["rtn:bits=4", "wanda+rtn"])     measure, and get a DataFrame
    frame = effbench.read("runs/custom-ref-1m-0a1b2c3d")            read what was measured before

Importing this imports neither torch nor pandas; the command line has to start in a blink.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read", "run"]


def run(
    model: str | None = None,
    techniques: str | Sequence[str] | None = None,
    *,
    suite: str | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Measure pipelines on a model, dense first, and return one row for each.

    `model` is an embedded one (ref-1m unless the suite says otherwise), a folder or a hub id; `techniques` are
    pipelines such as "wanda:sparsity=0.5+rtn:bits=4", the default suite's if none are given. `options` are fields of
    `effbench.suite.Suite` (tasks, text, limit, dtype, ...). Records go to `out`, or to a folder under runs/ that is
    named after the question; a run that was broken off is continued. Raises `UsageError` for a wrong question.
    """
    from effbench import harness
    from effbench.suite import ask

    pipelines = [techniques] if isinstance(techniques, str) else techniques
    for name in ("text", "calibration", "task_data"):
        if options.get(name) is not None:
            options[name] = str(options[name])
    if options.get("tasks") is not None:
        asked = options["tasks"]
        options["tasks"] = tuple(asked.split(",") if isinstance(asked, str) else asked)
    question = ask(model, pipelines, suite, **options)
    return read(harness.run(question, Path(out) if out is not None else None))


def read(folder: str | Path) -> pd.DataFrame:
    """The records of a folder as a DataFrame, one row each; a missing number is NaN, the column `missing` says why.

    Raises `RecordError` where there are none; warns of a file that cannot be read and leaves it out.
    """
    import warnings

    from effbench import results
    from effbench.measure.derived import rows
    from effbench.report.frame import frame

    records, errors = results.load_all(Path(folder))
    for error in errors:
        warnings.warn(str(error), stacklevel=2)
    return frame(rows(records))
