"""Suites in a folder -> records beside them, continued where they were left and made small when they are whole."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from effbench import harness, results, suite
from effbench.columns import column
from effbench.errors import RecordError
from effbench.evidence.stories import tell
from effbench.results import Record
from effbench.schedule import Progress

SHARE = 1e-3
"""Samples are rounded to it: sums of nats over hundreds of tokens, which tables show to 1e-4 a token."""


def measure(folder: Path, progress: Progress | None = None) -> None:
    """Every suite of the folder. Rows stay that answer the same question by the same code, weights and text.

    A suite whose model is a folder that is not here keeps the rows that it has.

    Raises `RecordError` where there are no suites, and what `effbench.harness.run` raises.
    """
    suites = sorted(folder.glob("*/suite.toml"))
    if not suites:
        raise RecordError(f"{folder} holds no folder with a suite.toml; give one that does")
    for path in suites:
        asked = harness.resolve(suite.load(str(path)))
        if not answerable(asked):
            continue
        if asked.calibration is not None:
            tell(asked.model, Path(asked.calibration))
        inputs = results.inputs(asked.model, asked.text, asked.calibration)
        for old in (path.parent / "records").glob("*.json"):
            if not _answers(results.load(old), asked, inputs):
                old.unlink()
        harness.run(asked, path.parent, progress)
        wanted = harness.check(asked)
        for record in results.load_all(path.parent)[0]:
            if record.pipeline not in wanted:
                results.path_of(record, path.parent).unlink()
            elif record.status != "running":
                save_small(record, path.parent)


def answerable(asked: suite.Suite) -> bool:
    """Whether the model is here, if it is a folder."""
    return not asked.model.startswith(".") or Path(asked.model).is_dir()


def _answers(record: Record, asked: suite.Suite, inputs: dict[str, str]) -> bool:
    return record.settings == asked.settings and record.provenance.get("inputs") == inputs


def save_small(record: Record, folder: Path) -> Path:
    """Write it without what no table reads: figures of time and memory, of one short round, and their samples."""
    record.values = {name: value for name, value in record.values.items() if _is_exact(name)}
    record.missing = {name: reason for name, reason in record.missing.items() if _is_exact(name)}
    paired = {name: samples for name, samples in record.samples.items() if re.match(r"(nll|tokens|correct)\b", name)}
    record.samples = {name: [_short(value) for value in samples] for name, samples in paired.items()}
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    flat = re.sub(r"\[[-\d.,\s]*\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
    path = results.path_of(record, folder)
    results.write_atomically(path, flat + "\n")
    return path


def _is_exact(name: str) -> bool:
    known = column(name)
    return known is not None and known.exact


def _short(value: float) -> float:
    return int(value) if value == int(value) else round(value / SHARE) / (1 / SHARE)
