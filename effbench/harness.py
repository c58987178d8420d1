"""The run: every pipeline is applied in one fresh process, measured in others, and each row saved as it grows.

    run        checks the question, then for each row:  apply -> quality -> speed   (effbench.jobs)
               dense comes first, since the others are measured against it; two rows are applied and scored side by
               side with a part of the threads each; what is timed runs alone, round by round with one dense worker
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from effbench import models, registry, results
from effbench.errors import PackageError, RecordError, UsageError
from effbench.results import Record
from effbench.suite import Suite
from effbench.worker import OUT_OF_MEMORY, Workers, wait_for

STAGES = ("apply", "quality", "speed")
MEASURES = {"apply": ("apply",), "quality": ("perplexity", "accuracy", "cache"), "speed": ("speed",)}
"""What each stage measures; a record names those that are finished, and they are not measured again."""


class Progress(Protocol):
    """What a run tells while it runs."""

    def start(self, total: int, out: Path) -> None:
        """A run of `total` steps into folder `out` begins."""

    def step(self, text: str) -> None:
        """One step is done; `text` says which."""

    def row(self, record: Record) -> None:
        """A row is complete."""

    def stop(self) -> None:
        """The run is over."""


class Silent:
    """No progress."""

    def start(self, total: int, out: Path) -> None: ...

    def step(self, text: str) -> None: ...

    def row(self, record: Record) -> None: ...

    def stop(self) -> None: ...


def run(suite: Suite, out: Path | None = None, progress: Progress | None = None) -> Path:
    """Measure every pipeline of the suite, dense first; the folder with the records.

    A folder that holds some of this suite's rows is continued. Raises `UsageError` before anything is measured
    where the question is wrong, and `RecordError` where `out` cannot be written or holds rows of another question.
    """
    suite = resolve(suite)
    pipelines = check(suite)
    out = out or default_folder(suite)
    _prepare(out, suite, pipelines)
    rows = [_record(out, suite, pipeline) for pipeline in pipelines]
    with tempfile.TemporaryDirectory(prefix="effbench-") as scratch:
        _Run(suite, out, Path(scratch), rows, progress or Silent()).go()
    return out


def resolve(suite: Suite) -> Suite:
    """The suite with its automatic values filled in for this machine."""
    device = suite.device
    if device != "cpu":
        import torch

        available = torch.cuda.is_available()
        if device == "cuda" and not available:
            raise UsageError("--device cuda was asked for, but torch sees no CUDA device (`effbench doctor` says more)")
        device = "cuda" if available else "cpu"
    threads = suite.threads or len(os.sched_getaffinity(0))
    tasks = suite.tasks
    if not tasks and models.is_reference(suite.model) and suite.text is None:
        from effbench.measure.accuracy import task_names

        tasks = tuple(task_names())
    return replace(suite, device=device, threads=threads, tasks=tasks)


def check(suite: Suite) -> list[str]:
    """The pipelines in canonical form, dense first, each once.

    Raises a `UsageError` for whatever is wrong with the question, before anything is measured.
    """
    trust = models.Trust(suite.allow_pickle, suite.trust_remote_code)
    models.check(suite.model, trust)
    models.check_dtype(suite.dtype, suite.device)
    pipelines = ["dense"]
    for asked in suite.techniques:
        try:
            pipeline = registry.canonical(asked)
        except PackageError:
            pipeline = asked  # its row will say what to install
        if pipeline not in pipelines:
            pipelines.append(pipeline)
    _check_text(suite)
    if suite.tasks:
        from effbench.measure.accuracy import check_tasks

        check_tasks(suite.tasks)
    return pipelines


def _check_text(suite: Suite) -> None:
    from effbench.data import read_documents

    for path in (suite.text, suite.calibration):
        if path is not None:
            read_documents(Path(path))
    if suite.calibration is not None and suite.text is None:
        raise UsageError("--calibration needs --text FILE beside it, the text that is evaluated")
    if suite.text is not None and models.is_reference(suite.model):
        from effbench.data import FileSource
        from effbench.reference import folder

        tokenizer = models.load_tokenizer(str(folder(suite.model.partition("@")[0])))
        FileSource(Path(suite.text), tokenizer)


def default_folder(suite: Suite) -> Path:
    """A folder for exactly this question and this code, so that asking again continues it."""
    import hashlib

    question = json.dumps([suite.settings, suite.techniques, suite.seed, results.code_digest()])
    model = Path(suite.model).name or "model"
    return Path("runs") / f"{suite.name}-{model}-{hashlib.sha256(question.encode()).hexdigest()[:8]}"


def _prepare(out: Path, suite: Suite, pipelines: Sequence[str]) -> None:
    """Make the folder and see that what lies in it belongs to this question."""
    for path in (out / "records").glob("*.json") if out.is_dir() else []:
        record = results.load(path)
        _same_question(out, record, suite)
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise RecordError(f"cannot write to {out} ({reason.strerror}); choose another folder with --out") from None
    asked = {**asdict(suite), "techniques": list(pipelines)}
    results.write_atomically(out / "run.json", json.dumps(asked, indent=1) + "\n")


def _same_question(out: Path, record: Record, suite: Suite) -> None:
    there = {**record.settings, "code": record.provenance.get("code")}
    here = {**suite.settings, "code": results.code_digest()}
    for name, value in here.items():
        if there.get(name) != value:
            raise RecordError(
                f"{out} holds rows measured with {name}={there.get(name)!r}, and now {name}={value!r} is asked for; "
                "give another folder with --out, or delete this one"
            )


def _record(out: Path, suite: Suite, pipeline: str) -> Record:
    """The row as far as it has come."""
    fresh = Record(suite.name, suite.model, pipeline, suite.seed, suite.settings)
    path = results.path_of(fresh, out)
    return results.load(path) if path.is_file() else fresh


class _Run:
    """One run: which row is at which stage."""

    def __init__(self, suite: Suite, out: Path, scratch: Path, rows: list[Record], progress: Progress) -> None:
        assert suite.threads is not None
        self.suite, self.out, self.scratch, self.progress = suite, out, scratch, progress
        self.dense, self.others = rows[0], [row for row in rows[1:] if row.status == "running"]
        self.beside = 2 if suite.device == "cpu" and suite.threads > 1 else 1
        self.deadlines: dict[int, float] = {}

    def go(self) -> None:
        """All stages of all rows. The workers are gone afterwards, whatever happens."""
        open_rows = len(self.others) + (self.dense.status == "running")
        self.progress.start(open_rows * len(STAGES), self.out)
        if open_rows:
            self.workers = Workers()
            try:
                self._stages([self.dense], 1)
                self._stages(self.others, self.beside)
                self._speed([self.dense, *self.others])
            finally:
                self.workers.close()
            for name in ("systems", "dense"):
                shutil.rmtree(self.out / name, ignore_errors=True)
            for path in (self.out / "logs").glob("*.log"):
                if path.stat().st_size == 0:
                    path.unlink()
        self.progress.stop()

    def _stages(self, rows: Sequence[Record], beside: int) -> None:
        """Apply and score the rows, so many at once; both stages of a row follow each other."""
        waiting = [(row.pipeline, stage) for row in rows for stage in ("apply", "quality")]
        assert self.suite.threads is not None
        threads = max(1, self.suite.threads // self.beside)
        busy: dict[int, tuple[str, str]] = {}
        while waiting or busy:
            free = [entry for entry in waiting if entry[0] not in {pipeline for pipeline, _ in busy.values()}]
            if free and len(busy) < beside:
                pipeline, stage = free[0]
                waiting.remove(free[0])
                if self._needed(pipeline, stage):
                    busy[self._submit(pipeline, stage, threads)] = (pipeline, stage)
                continue
            for job, code, timed_out in self._ended():
                pipeline, stage = busy.pop(job)
                self._settle(pipeline, stage, job, code, timed_out)

    def _speed(self, rows: Sequence[Record]) -> None:
        """Time the rows one after the other, each interleaved with the one dense worker."""
        todo = [row.pipeline for row in rows if self._needed(row.pipeline, "speed")]
        if not todo:
            return
        assert self.suite.threads is not None
        socket = self.scratch / "dense.socket"
        dense = self._submit("dense", "serve", self.suite.threads, socket=str(socket))
        if not wait_for(socket, self.suite.timeout_seconds):
            self.workers.cancel(dense)
        for pipeline in todo:
            job = self._submit(pipeline, "speed", self.suite.threads, socket=str(socket))
            while True:
                over = next((end for end in self._ended() if end[0] == job), None)
                if over:
                    break
            self._settle(pipeline, "speed", *over)
        self.workers.cancel(dense)

    def _needed(self, pipeline: str, stage: str) -> bool:
        """Whether this stage of the row has something left to do. Finished and hopeless rows have not."""
        record = self._load(pipeline)
        if stage == "quality" and pipeline == "dense" and not (self.out / "dense").is_dir():
            return bool(self.others)  # the others are compared with log-probabilities that are no longer there
        if record.status != "running":
            return False
        done = set(MEASURES[stage]) <= set(record.measured)
        if stage == "apply" and done and pipeline != "dense":
            later = {name for after in STAGES[1:] for name in MEASURES[after]}
            return not later <= set(record.measured) and not self._system(pipeline).is_dir()
        return not done

    def _submit(self, pipeline: str, stage: str, threads: int, **more: str) -> int:
        record = self._load(pipeline)
        arguments = {
            "out": str(self.out),
            "suite": asdict(self.suite),
            "pipeline": pipeline,
            "system": "" if pipeline == "dense" else str(self._system(pipeline)),
            **more,
        }
        log = self.out / "logs" / f"{record.slug}.log"
        job = self.workers.submit(f"effbench.jobs:{stage}", arguments, threads=threads, log=log)
        if stage != "serve":
            self.deadlines[job] = time.monotonic() + self.suite.timeout_seconds
        return job

    def _ended(self) -> list[tuple[int, int, bool]]:
        """Jobs that have ended: number, exit code, whether their time was over. Waits for a moment at most."""
        ended = self.workers.collect(timeout=0.5)
        if ended:
            late = self.deadlines.pop(ended[0], math.inf) < time.monotonic()
            return [(*ended, late)]
        for job, deadline in self.deadlines.items():
            if deadline < time.monotonic():
                self.workers.cancel(job)
        return []

    def _settle(self, pipeline: str, stage: str, job: int, code: int, timed_out: bool) -> None:
        """What the end of a stage means for its row."""
        record = self._load(pipeline)
        if record.status == "running":
            doing = {"apply": "applying", "quality": "scoring", "speed": "timing"}[stage]
            if code != 0 and timed_out:
                limit = self.suite.timeout_seconds
                record.status, record.reason = "timeout", f"{doing} took longer than {limit} s (--timeout)"
            elif code in (OUT_OF_MEMORY, -9):
                record.status, record.reason = "out_of_memory", f"{doing} ran out of memory"
            elif code != 0:
                last = self.workers.log_tail(job) or f"exit code {code}"
                record.status, record.reason = "failed", f"{doing} failed: {last}"
            elif {name for names in MEASURES.values() for name in names} <= set(record.measured):
                record.status = "ok"
            results.save(record, self.out)
        self.progress.step(f"{pipeline}: {stage}")
        if record.status != "running":
            shutil.rmtree(self._system(pipeline), ignore_errors=True)
            self.progress.row(record)

    def _load(self, pipeline: str) -> Record:
        return _record(self.out, self.suite, pipeline)

    def _system(self, pipeline: str) -> Path:
        return self.out / "systems" / results.slug(pipeline, self.suite.seed)


def apply_and_save(
    model: str,
    pipeline: str,
    folder: Path,
    *,
    text: str | None = None,
    calibration: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    trust: models.Trust = models.CAREFUL,
) -> None:
    """The result taken home: apply a pipeline to a model and save the system to `folder`.

    Raises `UsageError` for a wrong question and `UnfitError` where the pipeline does not fit the model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecordError(f"{folder} exists and is not empty; give a new folder with --save")
    text_suite = Suite(model=model, text=text, calibration=calibration, seed=seed, dtype=dtype, device=device)
    models.check(model, trust)
    pipeline = registry.canonical(pipeline)
    _check_text(text_suite)
    from effbench import jobs, store

    system = models.load(model, dtype, device, trust)
    system, _ = jobs.apply_pipeline(system, pipeline, jobs.data_for(text_suite, system))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        store.save(system, folder, pipeline)
    except OSError as reason:
        raise RecordError(f"cannot write to {folder} ({reason.strerror}); choose another folder with --save") from None
