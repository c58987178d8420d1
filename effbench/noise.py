"""Dense against itself, many times: how often this machine's noise would be taken for a difference, and what is found.

    python -m effbench.noise --out results/noise [--runs 20] [--seconds 220] [--loads quiet]

Each run is what a table of one row is: a dense worker, fresh processes of the dense model as the noise floor, and a
candidate, all timed by `effbench.jobs.rounds` and judged by `effbench.measure.paired`. The candidate is the dense model
again, or the dense model with a busy wait in the forward of one of its layers; each is judged by itself. Runs are kept
in a file, and the same command goes on where it was left; it stops after `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np

from effbench import harness, results
from effbench.measure import paired
from effbench.measure.disturbance import MOST
from effbench.measure.significance import LEVEL, detectable
from effbench.measure.statistics import p_of_student
from effbench.results import Record
from effbench.suite import Suite
from effbench.worker import Workers

CASES = {"same": 0.0, "slower by 3 %": 0.03, "slower by 10 %": 0.10}
"""What the candidate is: the share of a step that one of its layers waits."""
LOADS = ("quiet", "loaded")
"""The other core is left alone, or something computes on it."""
TIMED = ("prefill_seconds", "decode_seconds")


def candidate(
    out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str, share: float, found: str
) -> None:
    """Time the dense model, slowed by a share of its step, against the dense worker and its strays."""
    from effbench.jobs import rounds
    from effbench.jobs.row import Job
    from effbench.jobs.timing import _prompts
    from effbench.measure.speed import one_round
    from effbench.toolbox.walk import blocks

    job = Job(out, suite, pipeline, system)
    rounds.share_cores(1)
    loaded = job.load()
    prompts = _prompts(job, loaded)
    if share:
        step = min(one_round(loaded, prompts[0], job.suite.new_tokens)[1] for _ in range(5))

        def wait(*_: Any) -> None:
            end = time.perf_counter() + share * step
            while time.perf_counter() < end:
                pass

        blocks(loaded.model)[1][0].register_forward_hook(wait)
    record = Record("noise", job.suite.model, "candidate", 0)
    with Client(socket, family="AF_UNIX") as dense:
        done = rounds.rounds(loaded, prompts, job.suite.new_tokens, dense)
    rounds.put(record, done)
    Path(found).write_text(json.dumps(record.samples))


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(prog="python -m effbench.noise", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/noise"))
    parser.add_argument("--model", default="ref-1m")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=Suite("noise", "").rounds)
    parser.add_argument("--seconds", type=float, default=220)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    suite = harness.resolve(
        Suite("noise", asked.model, threads=1, rounds=asked.rounds, tasks=("ref_copying",), limit=8)
    )
    path = asked.out / "runs.jsonl"
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="effbench-") as scratch:
        runs = _Runs(suite, Path(scratch))
        try:
            for number in range(asked.runs):
                for load in asked.loads:
                    if time.monotonic() < end and not _is_done(path, number, load):
                        made = [{"run": number, "load": load, **line} for line in runs.one(load == "loaded")]
                        with path.open("a", encoding="utf-8") as file:
                            file.write("".join(json.dumps(line) + "\n" for line in made))
        finally:
            runs.close()
    (asked.out / "README.md").write_text(table(path), encoding="utf-8")
    print((asked.out / "README.md").read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _is_done(path: Path, number: int, load: str) -> bool:
    return any((line["run"], _load(line)) == (number, load) for line in _lines(path))


def _load(line: dict[str, Any]) -> str:
    """What the machine did in a run: one meant to be quiet in which others worked was not, and is done again."""
    disturbed = line["load"] == "quiet" and np.median(line["samples"]["others_share"]) > MOST
    return "not quiet" if disturbed else line["load"]


class _Runs:
    """The processes of the runs; each run has a dense worker, strays and candidates of its own."""

    def __init__(self, suite: Suite, scratch: Path) -> None:
        self.suite, self.scratch, self.workers = suite, scratch, Workers()
        self.out = scratch / "out"
        (self.out / "logs").mkdir(parents=True)
        self._end(self._start("effbench.jobs.applying:apply"))

    def close(self) -> None:
        """End them."""
        self.workers.close()

    def one(self, loaded: bool) -> list[dict[str, Any]]:
        """One run: the strays, and the samples of each candidate."""
        record_path = results.path_of(Record("noise", self.suite.model, "dense", 0), self.out)
        record = results.load(record_path)
        record.samples = {}
        results.save(record, self.out)
        socket, found = self.scratch / "dense.socket", self.scratch / "found.json"
        socket.unlink(missing_ok=True)
        busy = multiprocessing.Process(target=_compute, daemon=True)
        if loaded:
            busy.start()
        try:
            dense = self._start("effbench.jobs.timing:serve", socket=str(socket))
            while not socket.exists():
                time.sleep(0.02)
            for _ in range(self.suite.dense_runs):
                self._end(self._start("effbench.jobs.timing:stray", socket=str(socket)))
            cases = {}
            for case, share in CASES.items():
                self._end(self._start("effbench.noise:candidate", socket=str(socket), share=share, found=str(found)))
                cases[case] = json.loads(found.read_text())
            self.workers.cancel(dense)
            while self.workers.collect(1) is None:
                pass
        finally:
            if loaded:
                busy.kill()
                busy.join()
        floor = results.load(record_path).samples
        strays = {name: [floor[f"strays/{name}"], floor[f"strays_stderr/{name}"]] for name in TIMED}
        return [
            {
                "case": case,
                "strays": strays,
                "samples": {name: [float(f"{v:.4g}") for v in s] for name, s in kept.items()},
            }
            for case, kept in cases.items()
        ]

    def _start(self, call: str, **more: Any) -> int:
        arguments = {"out": str(self.out), "suite": asdict(self.suite), "pipeline": "dense", **more}
        arguments["system"] = str(self.out / "dense" / "system")
        assert self.suite.threads is not None
        return self.workers.submit(call, arguments, threads=self.suite.threads, log=self.out / "logs" / "log")

    def _end(self, job: int) -> None:
        while (ended := self.workers.collect(5)) is None or ended[0] != job:
            pass
        if ended[1] != 0:
            raise RuntimeError(self.workers.log_tail(job, 3))


def _compute() -> None:
    """A load on the core that is not timed: memory and arithmetic for as long as it is left alone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    values = np.ones(2**20)
    while True:
        values = np.tanh(values)


def judge(line: dict[str, Any], timed: str) -> tuple[float, float, float]:
    """Of one run: the logarithm of dense time over the candidate's, its p, and the smallest one that would be found."""
    record = Record("noise", "", "candidate", 0, samples=line["samples"])
    found = paired.log_ratio(record, timed)
    rounds = len(line["samples"][timed])
    stderr, freedom = paired.with_strays(found.stderr, rounds, *paired.between(*line["strays"][timed]))
    return found.value, p_of_student(found.value, stderr, freedom), detectable(stderr, freedom)


def table(path: Path) -> str:
    """What the runs say, as Markdown."""
    lines = _lines(path)
    said = [
        "# Dense against itself",
        "",
        f"Made by `python -m effbench.noise`. A difference is claimed at level {LEVEL}: beyond the rounds' own error "
        "and beyond how far fresh processes of the dense model stray from the dense worker. Where none is claimed, the "
        "smallest that would have been, four times in five, says what could be seen. Runs that were meant to be quiet "
        "and were not, by what others used of the processors, are shown apart and done again.",
        "",
        "| other core | candidate | time | runs | claimed | median ratio | ratios | smallest seen | disturbed |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for load in (*LOADS, "not quiet"):
        for case in CASES:
            some = [line for line in lines if (_load(line), line["case"]) == (load, case)]
            for timed in TIMED if some else ():
                values, p, least = np.array([judge(line, timed) for line in some]).T
                ratios = np.exp(values)
                disturbed = sum(max(line["samples"]["others_share"]) > MOST for line in some)
                said.append(
                    f"| {load} | {case} | {timed.partition('_')[0]} | {len(some)} | {int((p < LEVEL).sum())} "
                    f"| {np.median(ratios):.3f} | {ratios.min():.3f}–{ratios.max():.3f} "
                    f"| {100 * (np.exp(np.median(least)) - 1):.1f} % | {disturbed} |"
                )
    return "\n".join(said) + "\n"


if __name__ == "__main__":
    main()
