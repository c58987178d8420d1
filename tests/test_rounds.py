"""Rounds alternate, are watched, and are never silently kept when something disturbed them."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_system

from effbench import harness, results, schedule
from effbench.errors import UsageError
from effbench.jobs import rounds
from effbench.measure import disturbance
from effbench.measure.derived import rows as derive
from effbench.measure.disturbance import Moment, others_share
from effbench.results import Record
from effbench.suite import Suite
from effbench.worker import OUT_OF_MEMORY


def test_what_others_use_of_the_processors_is_what_neither_worker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance.psutil, "cpu_count", lambda: 4)
    before = Moment(100.0, 5.0, 1000.0, 7)
    alone = Moment(102.0, 6.0, 1002.0, 9)  # 1 s of its own and 1 s of the dense worker's in 2 s
    assert others_share(before, alone, 1.0) == 0
    beside = Moment(102.0, 6.0, 1004.0 + disturbance.TICK_SECONDS, 9)
    assert others_share(before, beside, 1.0) == pytest.approx(2 / 8)


def test_the_machine_tells_its_conditions_or_why_it_does_not() -> None:
    said = rounds.surroundings(disturbance.conditions())
    assert len(said["load"]) == 2
    assert all(said[name][1] is not None or said["unknown"][name] for name in disturbance.UNKNOWN)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Rounds of a small system beside itself, whose shares of others are given."""
    system = random_system("llama")

    def run(shares: list[float], count: int = 3) -> list[rounds.Round]:
        prompts = [torch.randint(0, 100, (1, 8), generator=torch.Generator().manual_seed(k)) for k in range(count + 1)]
        given = iter(shares)
        monkeypatch.setattr(disturbance, "others_share", lambda *_: next(given))
        here, there = Pipe()

        def serve() -> None:
            with pytest.raises(EOFError):
                rounds.answer(system, {"": prompts}, 4, there)

        worker = threading.Thread(target=serve)
        worker.start()
        try:
            return rounds.rounds(system, prompts, 4, here)
        finally:
            here.close()
            worker.join()

    yield run


def test_a_disturbed_round_is_repeated_and_the_row_says_so_where_it_stays_disturbed(timed: Any) -> None:
    assert [one.others_share for one in timed([0.0, 0.02, 0.1])] == [0.0, 0.02, 0.1]
    assert [one.others_share for one in timed([0.0, 0.6, 0.1, 0.05])] == [0.0, 0.05, 0.1]
    done = timed([0.0, 0.6, 0.9, 0.7, 0.5])
    assert [one.others_share for one in done] == [0.0, 0.6, 0.5]
    record = Record("s", "m", "rtn", 0, {}, "ok")
    rounds.put(record, done)
    said = derive([record])[0].warnings["disturbed"]
    assert said.startswith("2 of 3 timed rounds stayed disturbed") and "60 %" in said
    assert len(record.samples["prefill_seconds"]) == 3, "they are kept, and said to be what they are"


def test_a_condition_that_is_not_one_is_refused() -> None:
    assert Suite(conditions=("8x128", "1x512")).timed == {"8x128": (8, 128), "1x512": (1, 512)}
    for wrong in ("8", "8x", "x8", "0x8", "8x8x8", "axb"):
        with pytest.raises(UsageError, match="BATCHxTOKENS"):
            Suite(conditions=(wrong,))


@pytest.mark.parametrize(("scatter", "done"), [(0.005, 8), (0.3, 24)])
def test_there_are_more_rounds_where_the_ratio_is_loose(
    timed: Any, monkeypatch: pytest.MonkeyPatch, scatter: float, done: int
) -> None:
    random = np.random.default_rng(0)
    generation = rounds.one_round(random_system("llama"), torch.ones(1, 8, dtype=torch.long), 2)[2]
    monkeypatch.setattr(rounds, "one_round", lambda *_: (1.0, float(np.exp(random.normal(0, scatter))), generation))
    assert len(timed([0.0] * 24, 8)) == done
    assert len(timed([0.0] * 24, 2)) == 2, "two rounds do not say how far they lie apart"


def test_further_conditions_are_timed_and_dense_is_timed_against_itself(tmp_path: Path) -> None:
    suite = Suite(
        model="ref-70k",
        techniques=("magnitude",),
        tasks=("ref_copying",),
        limit=4,
        rounds=2,
        new_tokens=24,
        prompt_tokens=16,
        conditions=("3x24",),
        dense_runs=3,
        device="cpu",
        threads=1,
    )
    found = derive(results.load_all(harness.run(suite, tmp_path))[0])
    for row in found:
        assert row.record.status == "ok", row.record.reason
        for name in ("prefill_speedup", "decode_speedup", "prefill_speedup/3x24", "decode_speedup/3x24"):
            assert row.values[name], name
    dense, magnitude = found
    assert all(len(values) == 2 for name, values in dense.record.samples.items() if name.startswith("strays/"))
    assert magnitude.values["decode_speedup_p/3x24"] is not None
    assert "too few rounds" in magnitude.missing["decode_speedup_detectable"]
    assert magnitude.simulated and magnitude.values["speed_rank"] is None and dense.values["speed_rank"] == 1
    assert magnitude.record.provenance["timing"]["load"]


class StubWorkers:
    """Workers that end at once, by `code(pipeline, socket)`; `None` is one that runs for ever."""

    def __init__(self, code: Callable[[str, str], int | None]) -> None:
        self.code, self.started, self.asked = code, dict[int, float](), list[str]()
        self.ended: list[tuple[int, int]] = []
        self.jobs = 0

    def submit(self, call: str, arguments: dict[str, Any], *, threads: int, log: Path) -> int:
        self.jobs += 1
        pipeline, socket = arguments["pipeline"], arguments["socket"]
        self.asked.append(f"{call.rpartition(':')[2]} {pipeline}{'' if socket else ' alone'}")
        if call.endswith("serve"):
            Path(socket).touch()
            return self.jobs
        code = self.code(pipeline, socket)
        if code is None:
            self.started[self.jobs] = -math.inf
        else:
            self.ended.append((self.jobs, code))
        return self.jobs

    def collect(self, timeout: float | None = None) -> tuple[int, int] | None:
        return self.ended.pop() if self.ended else None

    def cancel(self, job: int) -> None:
        self.ended.append((job, -9))


def scored(suite: Suite, folder: Path, *pipelines: str) -> list[Record]:
    """Rows that are only to be timed."""
    rows = [Record(suite.name, suite.model, name, 0, suite.settings) for name in pipelines]
    for row in rows:
        row.measured = dict.fromkeys(("apply", "perplexity", "accuracy", "cache"), 1.0)
        results.save(row, folder)
    return rows


def asked_of_workers(
    suite: Suite, folder: Path, rows: list[Record], code: Callable[[str, str], int | None] = lambda *_: 0
) -> list[str]:
    """What was asked of the workers while these rows were timed."""
    work = schedule.Schedule(suite, folder, folder, rows, schedule.Silent())
    workers = StubWorkers(code)
    work.workers = workers  # type: ignore[assignment]
    work._speed([work.dense, *work.others])
    return workers.asked


def test_a_row_that_does_not_fit_beside_dense_is_measured_alone_and_has_no_times(tmp_path: Path) -> None:
    def code(pipeline: str, socket: str) -> int:
        return OUT_OF_MEMORY if pipeline == "big" and socket else 0

    suite = Suite(threads=1, dense_runs=1)
    asked = asked_of_workers(suite, tmp_path, scored(suite, tmp_path, "dense", "big", "small"), code)
    assert asked == ["serve dense", "speed dense", "speed big", "speed big alone", "serve dense", "speed small"]


def test_a_row_that_takes_too_long_is_not_taken_for_one_that_does_not_fit_and_gets_the_time_it_is_given_later(
    tmp_path: Path,
) -> None:
    suite = Suite(threads=1, dense_runs=1, timeout_seconds=10)
    rows = scored(suite, tmp_path, "dense", "slow", "small")
    asked = asked_of_workers(suite, tmp_path, rows, lambda pipeline, _: None if pipeline == "slow" else 0)
    assert asked == ["serve dense", "speed dense", "speed slow", "speed small"]
    rows = [results.load(results.path_of(row, tmp_path)) for row in rows]
    assert rows[1].status == "timeout" and "10 s (--timeout)" in str(rows[1].reason)
    for seconds, again in ((10, []), (11, ["slow"])):
        given = replace(suite, timeout_seconds=seconds)
        assert given.settings == suite.settings
        work = schedule.Schedule(given, tmp_path, tmp_path, rows, schedule.Silent())
        assert [row.pipeline for row in work.others if row.pipeline == "slow"] == again


def test_a_run_killed_before_the_noise_floor_was_whole_measures_the_rest_of_it(tmp_path: Path) -> None:
    suite = Suite(threads=1, dense_runs=3)
    rows = scored(suite, tmp_path, "dense", "small")
    rows[0].status, rows[0].measured["speed"] = "ok", 1.0
    rows[0].samples["strays/decode_seconds"] = [0.0]
    results.save(rows[0], tmp_path)

    def code(pipeline: str, socket: str) -> int:
        record = results.load(results.path_of(rows[0], tmp_path))
        if pipeline == "dense":
            record.samples["strays/decode_seconds"].append(0.0)
            results.save(record, tmp_path)
        return 0

    assert asked_of_workers(suite, tmp_path, rows, code) == ["serve dense", "stray dense", "speed small"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system knows no affinity")
def test_a_process_that_stays_on_one_core_tells_of_all_that_there_are() -> None:
    ask = (
        "import os; from effbench.jobs.rounds import share_cores; from effbench.measure.host import machine; "
        "share_cores(1); print(len(os.sched_getaffinity(0)), machine()['cores'])"
    )
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["1", str(len(os.sched_getaffinity(0)))]
