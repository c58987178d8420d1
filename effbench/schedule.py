"""Who works when: every row goes through three stages, each in a fresh process, and is saved as it grows.

    apply -> quality -> speed    (effbench.jobs)

Dense comes first, since the others are compared with it: none is applied before it is, and none scored before it is.
Two rows are applied and scored side by side with a part of the threads each; what is timed runs alone, round by round
with one dense worker that serves the whole run.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from effbench import results
from effbench.results import Record
from effbench.suite import Suite
from effbench.worker import OUT_OF_MEMORY, Workers

STAGES = ("apply", "quality", "speed")
JOBS = {
    "apply": "applying:apply",
    "quality": "scoring:quality",
    "speed": "timing:speed",
    "serve": "timing:serve",
    "stray": "timing:stray",
}
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


def record_for(out: Path, suite: Suite, pipeline: str) -> Record:
    """The row as far as it has come."""
    fresh = Record(suite.name, suite.model, pipeline, suite.seed, suite.settings)
    path = results.path_of(fresh, out)
    return results.load(path) if path.is_file() else fresh


def _is_whole(record: Record) -> bool:
    """Whether all stages have measured what they measure."""
    return {name for names in MEASURES.values() for name in names} <= set(record.measured)


def _free(waiting: list[tuple[str, str]], busy: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The stages of rows that may begin now: none of a row at work, and none that needs what dense has not done."""
    working = {pipeline for pipeline, _ in busy}
    first = {stage for pipeline, stage in waiting + busy if pipeline == "dense"}
    held = set(STAGES) if "apply" in first else first
    return [entry for entry in waiting if entry[0] not in working and (entry[0] == "dense" or entry[1] not in held)]


class Schedule:
    """One run: which row is at which stage."""

    def __init__(self, suite: Suite, out: Path, scratch: Path, rows: list[Record], progress: Progress) -> None:
        assert suite.threads is not None
        self.suite, self.out, self.scratch, self.progress = suite, out, scratch, progress
        for row in rows:
            if row.status == "timeout" and suite.timeout_seconds > row.provenance.get("timeout_seconds", math.inf):
                row.status, row.reason = "running", None  # it is given more time than it had
                results.save(row, out)
            if row.status == "running" and _is_whole(row):  # the run was killed between its last measure and this
                row.status = "ok"
                results.save(row, out)
        self.dense, self.others = rows[0], [row for row in rows[1:] if row.status == "running"]
        self.beside = suite.rows_at_once
        self.timed: set[int] = set()

    def work(self) -> None:
        """All stages of all rows. The workers are gone afterwards, whatever happens."""
        open_rows = len(self.others) + (self.dense.status == "running")
        self.progress.start(open_rows * len(STAGES), self.out)
        if open_rows:
            self.workers = Workers()
            try:
                self._stages([self.dense, *self.others])
                self._speed([self.dense, *self.others])
            finally:
                self.workers.close()
            for name in ("systems", "dense"):
                shutil.rmtree(self.out / name, ignore_errors=True)
            for path in (self.out / "logs").glob("*.log"):
                if path.stat().st_size == 0:
                    path.unlink()
        self.progress.stop()

    def _stages(self, rows: Sequence[Record]) -> None:
        """Apply and score the rows, so many at once; both stages of a row follow each other."""
        waiting = [(row.pipeline, stage) for row in rows for stage in ("apply", "quality")]
        assert self.suite.threads is not None
        threads = max(1, self.suite.threads // self.beside)
        busy: dict[int, tuple[str, str]] = {}
        while waiting or busy:
            free = _free(waiting, list(busy.values()))
            if free and len(busy) < self.beside:
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
        self.ended: dict[int, tuple[int, bool]] = {}
        self._start_dense()
        if "dense" not in todo:
            self._strays()  # the run may have been killed between the dense row's rounds and these
        for pipeline in todo:
            gone = self.ended.get(self.worker)
            if gone and gone[0] not in (OUT_OF_MEMORY, -9):
                why = self.workers.log_tail(self.worker) or f"exit code {gone[0]}"
                self._fail(pipeline, f"there is no dense worker to be timed beside: {why}")
                continue
            code, late, job = self._time(pipeline)
            self._settle(pipeline, "speed", job, code, late)
            if pipeline == "dense":
                self._strays()
        self.workers.cancel(self.worker)

    def _start_dense(self) -> None:
        """Start the dense worker; it may have ended before it could serve."""
        assert self.suite.threads is not None
        self.socket = self.scratch / "dense.socket"
        self.socket.unlink(missing_ok=True)
        self.worker = self._submit("dense", "serve", self.suite.threads, socket=str(self.socket))
        while not self.socket.exists() and self.worker not in self.ended:
            self._collect()

    def _collect(self) -> None:
        self.ended |= {job: (code, late) for job, code, late in self._ended()}

    def _wait(self, job: int) -> tuple[int, bool, int]:
        while job not in self.ended:
            self._collect()
        return (*self.ended[job], job)

    def _time(self, pipeline: str) -> tuple[int, bool, int]:
        """Time one row beside the dense worker; alone, and without times, where memory does not hold both."""
        assert self.suite.threads is not None
        if self.worker not in self.ended:
            done = self._wait(self._submit(pipeline, "speed", self.suite.threads, socket=str(self.socket)))
            code, late, _ = done
            if late or code not in (OUT_OF_MEMORY, -9) or pipeline == "dense":
                return done
            self.workers.cancel(self.worker)
            self._wait(self.worker)
        done = self._wait(self._submit(pipeline, "speed", self.suite.threads, socket=""))
        self._start_dense()
        return done

    def _strays(self) -> None:
        """Time further processes of the dense model against the dense worker."""
        assert self.suite.threads is not None
        while self.worker not in self.ended:
            record = self._load("dense")
            done = len(record.samples.get("strays/decode_seconds", []))
            if record.status != "ok" or done + 1 >= self.suite.dense_runs:
                return
            code, *_ = self._wait(self._submit("dense", "stray", self.suite.threads, socket=str(self.socket)))
            if code != 0:
                return  # the rows are held against those that there are

    def _fail(self, pipeline: str, reason: str) -> None:
        record = self._load(pipeline)
        record.status, record.reason = "failed", reason
        results.save(record, self.out)
        self.progress.row(record)

    def _needed(self, pipeline: str, stage: str) -> bool:
        """Whether this stage of the row has something left to do. Finished and hopeless rows have not."""
        record = self._load(pipeline)
        if pipeline == "dense" and stage != "speed" and record.status in ("running", "ok"):
            # what all rows share may be gone since the dense row was finished
            made = {"apply": "prompts.npy", "quality": "log_probabilities.npy"}[stage]
            if not (self.out / "dense" / made).is_file():
                return True
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
            "system": str(self._system(pipeline)),
            **more,
        }
        log = self.out / "logs" / f"{record.slug}.log"
        job = self.workers.submit(f"effbench.jobs.{JOBS[stage]}", arguments, threads=threads, log=log)
        if stage != "serve":
            self.timed.add(job)
        return job

    def _ended(self) -> list[tuple[int, int, bool]]:
        """Jobs that have ended: number, exit code, whether their time was over. Waits for a moment at most."""
        ended = self.workers.collect(timeout=0.5)
        late = {job for job in self.timed if self._runtime(job) > self.suite.timeout_seconds}
        if ended:
            self.timed.discard(ended[0])
            return [(*ended, ended[0] in late)]
        for job in late:
            self.workers.cancel(job)
        return []

    def _runtime(self, job: int) -> float:
        """Seconds since the job began to run."""
        return time.monotonic() - self.workers.started.get(job, time.monotonic())

    def _settle(self, pipeline: str, stage: str, job: int, code: int, timed_out: bool) -> None:
        """What the end of a stage means for its row."""
        record = self._load(pipeline)
        if record.status == "running":
            doing = {"apply": "applying", "quality": "scoring", "speed": "timing"}[stage]
            if code != 0 and timed_out:
                limit = self.suite.timeout_seconds
                record.status, record.reason = "timeout", f"{doing} took longer than {limit} s (--timeout)"
                record.provenance["timeout_seconds"] = limit
            elif code in (OUT_OF_MEMORY, -9):
                record.status, record.reason = "out_of_memory", f"{doing} ran out of memory"
            elif code != 0:
                last = self.workers.log_tail(job) or f"exit code {code}"
                record.status, record.reason = "failed", f"{doing} failed: {last}"
            elif _is_whole(record):
                record.status = "ok"
            results.save(record, self.out)
        self.progress.step(f"{pipeline}: {stage}")
        if record.status != "running":
            if pipeline != "dense":
                shutil.rmtree(self._system(pipeline), ignore_errors=True)
            self.progress.row(record)

    def _load(self, pipeline: str) -> Record:
        return record_for(self.out, self.suite, pipeline)

    def _system(self, pipeline: str) -> Path:
        """Where a row's system is saved while the run goes on; dense lies with what all rows share."""
        if pipeline == "dense":
            return self.out / "dense" / "system"
        return self.out / "systems" / results.slug(pipeline, self.suite.seed)
