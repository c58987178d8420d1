"""The run: every end of a row is a row, nothing finished is lost or done twice, and nobody is left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from effbench import harness, registry, results
from effbench.errors import RecordError, UsageError
from effbench.schedule import _free
from effbench.suite import Suite

PLUGIN = '''
"""Techniques that go wrong, each in its own way."""

import os
import time
from dataclasses import dataclass

import torch

from effbench.technique import Technique
from effbench.toolbox.walk import matrices


@dataclass(frozen=True)
class {name}(Technique):
    def apply(self, system, data):
        {body}
        return system
'''
BODIES = {
    "crashing": "os._exit(3)",
    "raising": "raise RuntimeError('the matrix is singular')",
    "greedy": "raise MemoryError",
    "vast": "torch.ones(1 << 34, dtype=torch.uint8)",
    "killed": "os.kill(os.getpid(), 9)",
    "sleeping": "time.sleep(600)",
    "hoarding": "globals().update(kept=[linear.weight.clone() for _, linear in matrices(system.model)])",
    "textless": "from effbench.errors import UnfitError; raise UnfitError('this model is too small')",
}
QUICK = {
    "model": "ref-70k",
    "tasks": ("ref_copying", "ref_agreement"),
    "limit": 4,
    "rounds": 2,
    "new_tokens": 4,
    "prompt_tokens": 16,
    "device": "cpu",
    "threads": 2,
}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The techniques of `BODIES`, installed as entry points for this process and its workers."""
    site = tmp_path / "site"
    info = site / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    points = "\n".join(f"pruning.{name} = broken_{name}" for name in BODIES)
    (info / "entry_points.txt").write_text(f"[effbench.techniques]\n{points}\n")
    for name, body in BODIES.items():
        (site / f"broken_{name}.py").write_text(PLUGIN.format(name=name.capitalize(), body=body))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    registry.entries.cache_clear()
    yield
    registry.entries.cache_clear()


@pytest.mark.usefixtures("plugins")
def test_every_way_to_go_wrong_is_a_row_with_a_reason_and_the_others_go_on(tmp_path: Path) -> None:
    suite = Suite(techniques=(*BODIES, "magnitude"), timeout_seconds=15, **QUICK)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)  # of workers too; Linux keeps it
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, hard))
    try:
        out = harness.run(suite, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    records, errors = results.load_all(out)
    assert not errors
    found = {record.pipeline: (record.status, record.reason or "") for record in records}
    assert found["dense"] == ("ok", "") and found["magnitude"] == ("ok", "")
    assert found["crashing"][0] == "failed" and "exit code 3" in found["crashing"][1]
    assert found["raising"][0] == "failed" and "singular" in found["raising"][1]
    assert found["greedy"][0] == found["killed"][0] == found["vast"][0] == "out_of_memory"
    assert found["sleeping"][0] == "timeout" and "15 s" in found["sleeping"][1]
    assert found["hoarding"][0] == "failed" and "outside the model's parameters" in found["hoarding"][1]
    assert found["textless"] == ("unfit", "textless: this model is too small")
    for record in records:
        for name, value in record.values.items():
            assert value is not None or record.missing[name], f"{record.pipeline}: {name} is missing without a reason"
    assert not (out / "systems").exists() and not (out / "dense").exists()


def exact(out: Path) -> dict[str, dict[str, object]]:
    """All that has to be the same in two runs of one question."""
    from effbench.columns import column

    content = {}
    for record in results.load_all(out)[0]:
        values = {
            name: value for name, value in record.values.items() if (found := column(name)) is None or found.exact
        }
        timed = ("others_share", "switches", "idealized_slope")
        samples = {name: v for name, v in record.samples.items() if not name.endswith("seconds") and name not in timed}
        content[record.pipeline] = {"status": record.status, "reason": record.reason, **values, **samples}
    return content


def start(out: Path) -> subprocess.Popen[bytes]:
    pipelines = ("magnitude", "magnitude:pattern=2:4")
    code = (
        "from pathlib import Path; from effbench import harness; from effbench.suite import Suite;"
        f"harness.run(Suite(techniques={pipelines!r}, **{QUICK!r}), Path({str(out)!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_run_killed_at_any_point_continues_and_ends_the_same(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert start(undisturbed).wait() == 0
    out = tmp_path / "killed"
    done: dict[str, dict[str, float]] = {}
    for moment in (5.5, 7.0):
        process = start(out)
        time.sleep(moment)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=5)
        assert not alive, "workers outlive the run"
        for path in (out / "records").glob("*.json"):
            record = results.load(path)
            assert done.get(record.pipeline, {}).items() <= record.measured.items(), "a finished measure was run again"
            done[record.pipeline] = record.measured
    assert start(out).wait() == 0
    assert exact(out) == exact(undisturbed)
    last = results.load_all(out)[0][-1]
    last.status = "running"  # as if killed between the last measure and the word that the row is complete
    results.save(last, out)
    assert start(out).wait() == 0
    assert exact(out) == exact(undisturbed)
    for record in results.load_all(out)[0]:
        assert done.get(record.pipeline, {}).items() <= record.measured.items(), "a finished measure was run again"


def order(at_once: int) -> list[tuple[str, str]]:
    """In which order the stages of three rows begin, so many at once, where the one that began first ends first."""
    waiting = [(pipeline, stage) for pipeline in ("dense", "a", "b") for stage in ("apply", "quality")]
    busy: list[tuple[str, str]] = []
    begun = []
    while waiting or busy:
        free = _free(waiting, busy)
        if free and len(busy) < at_once:
            waiting.remove(free[0])
            busy.append(free[0])
            begun.append(free[0])
        else:
            busy.pop(0)
    return begun


def test_no_row_is_applied_or_scored_before_dense_is_and_rows_are_applied_while_dense_is_scored() -> None:
    rows = [(pipeline, stage) for pipeline in ("dense", "a", "b") for stage in ("apply", "quality")]
    assert order(1) == rows
    assert order(2) == [*rows[:3], ("b", "apply"), ("a", "quality"), ("b", "quality")]
    slow = [("dense", "quality")]
    assert _free(rows[2:], slow) == [("a", "apply"), ("b", "apply")]
    assert _free(rows[3:4], slow) == [] and _free(rows[1:], [rows[0]]) == []


def test_a_folder_of_another_question_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    record = results.Record("custom", "ref-70k", "dense", 0, Suite(**{**QUICK, "limit": 5}).settings)
    record.provenance = results.provenance()
    path = results.save(record, tmp_path)
    before = path.read_text()
    with pytest.raises(RecordError, match="limit=5"):
        harness.run(Suite(**QUICK), tmp_path)
    assert path.read_text() == before


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="--out"):
        harness.run(Suite(**QUICK), tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"techniques": ("magnitud",)}, "did you mean 'magnitude'"),
        ({"techniques": ("magnitude:sparsty=1",)}, "did you mean 'sparsity'"),
        ({"techniques": ("magnitude:sparsity=2",)}, "got 2"),
        ({"techniques": ("magnitude+",)}, "malformed"),
        ({"tasks": ("ref_copyin",)}, "did you mean 'ref_copying'"),
        ({"model": "./nowhere"}, "no model"),
        ({"dtype": "float16"}, "slower"),
        ({"text": "nowhere.txt"}, "no text file"),
    ],
)
def test_a_wrong_question_is_refused_before_anything_is_measured(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        harness.run(Suite(**{**QUICK, **changes}), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    record = results.Record("custom", "ref-70k", "rtn:bits=4+magnitude", 0)
    record.put("perplexity", 2.5)
    record.put("accuracy", None, "no tasks")
    path = results.save(record, tmp_path)
    assert results.load(path) == record
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_text(path.read_text()[:60])
    with pytest.raises(RecordError, match=path.name.replace("+", r"\+")):
        results.load(path)
    assert json.dumps(results.slug("a" * 300, 0)) != json.dumps(results.slug("a" * 301, 0))
