"""How long a whole run takes: twenty pipelines of all families, every item of every task."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from effbench import results, suite
from effbench.evidence.table import NOT_YET, Line, Table, number
from effbench.measure import host

RECORD = "whole.json"
MORE = ("awq:bits=4", "hqq:bits=4", "wanda:sparsity=0.5")
"""Beside those of the default suite, one of which is unfit to show that."""
PIPELINES, SECONDS = 20, 480.0
"""So many that come to figures, within so long."""


def measure(folder: Path) -> None:
    """Run them all and write how long that took to `folder`, unless it is there already."""
    if (folder / RECORD).is_file():
        return
    from effbench import harness  # brings torch

    default = suite.load(suite.DEFAULT)
    asked = harness.resolve(replace(default, techniques=(*default.techniques, *MORE), limit=None))
    with tempfile.TemporaryDirectory(prefix="effbench-") as scratch:
        started = time.perf_counter()
        records = results.load_all(harness.run(asked, Path(scratch) / "run"))[0]
        seconds = time.perf_counter() - started
    dense = records[0]
    found = {
        "model": asked.model,
        "pipelines": sum(record.status == "ok" for record in records) - 1,
        "others": [f"{record.pipeline}: {record.status}" for record in records if record.status != "ok"],
        "tasks": len(asked.tasks),
        "items": sum(len(items) for name, items in dense.samples.items() if name.startswith("correct/")),
        "tokens": sum(dense.samples["tokens"]),
        "rounds": asked.rounds,
        "seconds": round(seconds, 1),
        "machine": host.machine()["cpu"],
        "threads": asked.threads,
    }
    (folder / RECORD).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(folder: Path) -> Table:
    """What was measured, and how long it took."""
    path, heads = folder / RECORD, ("model", "pipelines beside dense", "items", "tokens of text", "minutes")
    line = Line([NOT_YET] * len(heads))
    after: tuple[str, ...] = ()
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        cells = [found["model"], str(found["pipelines"]), f"{found['items']:,}", f"{found['tokens']:,.0f}"]
        holds = found["pipelines"] >= PIPELINES and found["seconds"] < SECONDS
        line = Line([*cells, number(found["seconds"] / 60, 1)], holds)
        after = (
            f"{found['tasks']} tasks; time in {found['rounds']} rounds, memory and energy as in every run; "
            f"{found['machine']}, {found['threads']} threads",
        )
    return Table(
        "A whole run",
        f"{PIPELINES} pipelines with every item of every task take less than {SECONDS / 60:.0f} minutes.",
        heads,
        [line],
        after,
    )
