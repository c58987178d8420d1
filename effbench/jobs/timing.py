"""Timing a system beside the dense worker, and its memory in a process of its own."""

from __future__ import annotations

from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effbench import results
from effbench.errors import EffbenchError, UnfitError
from effbench.jobs import rounds, sharing
from effbench.jobs.row import Job
from effbench.measure import disturbance, energy, limits, memory, roofline
from effbench.measure.counters import meter
from effbench.measure.host import machine
from effbench.measure.speed import one_round
from effbench.technique import System


def speed(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """Memory of the system in a process of its own, then its time in rounds interleaved with the dense worker's.

    Without a `socket` there is no room for the dense worker, and no time.
    """
    job = Job(out, suite, pipeline, system)
    rounds.share_cores(torch.get_num_threads())
    before = memory.resident_bytes()
    memory.reset_peak()
    loaded = job.load()
    job.record.provenance["machine"] = machine()  # a run may be continued on another one
    job.measure("speed", lambda: _time(job, loaded, before, Path(socket) if socket else None))


TIMES = (
    "prefill_seconds",
    "decode_seconds_per_token",
    "tokens_per_pass",
    "acceptance_rate",
    *roofline.WORK,
    "idealized_seconds",
    *energy.COLUMNS,
)
COLUMNS = (
    *TIMES,
    "peak_bytes",
    "peak_growth_bytes",
    "peak_device_bytes",
    "peak_device_reserved_bytes",
    "device_process_bytes",
)


def _time(job: Job, system: System, before: int, socket: Path | None) -> None:
    record, suite = job.record, job.suite
    given = _prompts(job, system)
    try:
        one_round(system, given[0], suite.new_tokens)
    except UnfitError as reason:
        for name in COLUMNS:
            record.put(name, None, str(reason))
        return
    peak = memory.peak_bytes()
    record.put("peak_bytes", peak)
    record.put("peak_growth_bytes", peak - before)
    record.put("peak_device_bytes", memory.peak_device_bytes(system.device), "no GPU was used")
    record.put("peak_device_reserved_bytes", memory.peak_device_reserved_bytes(system.device), "no GPU was used")
    here = "no GPU was used" if system.device.type == "cpu" else "the driver does not tell it (nvidia-ml-py does)"
    record.put("device_process_bytes", memory.device_process_bytes(system.device), here)
    stored = memory.stored_bytes(system)
    if stored != record.values["stored_bytes"]:
        raise EffbenchError(
            f"stores {stored:,} bytes after a forward pass, and {record.values['stored_bytes']:,.0f} when it was saved"
        )
    if socket is None:
        for name in TIMES:
            record.put(name, None, "the dense model and this one do not fit into memory together")
        return
    before_rounds = disturbance.conditions()
    with Client(str(socket), family="AF_UNIX") as dense:
        done = rounds.rounds(system, given, suite.new_tokens, dense)
        rounds.put(record, done)
        for condition in suite.conditions:
            _time_condition(job, system, dense, condition)
    record.provenance["timing"] = rounds.surroundings(before_rounds)
    made = [one.generation for one in done]
    new, passes = sum(one.ids.shape[1] for one in made), sum(one.passes for one in made)
    proposed, accepted = sum(one.proposed for one in made), sum(one.accepted for one in made)
    new -= len(done) * given[0].shape[1]
    record.put("tokens_per_pass", new / (passes + len(done)))
    record.put("acceptance_rate", accepted / proposed if proposed else None, "nothing is drafted")
    threads = torch.get_num_threads()
    roofline.measure(record, system, given[1], suite.new_tokens, limits.known(system.device.type, threads))
    energy.measure(record, system, given[1], suite.new_tokens, meter(suite.device))


def _time_condition(job: Job, system: System, dense: Connection, condition: str) -> None:
    """The same rounds under one of the suite's further conditions."""
    try:
        done = rounds.rounds(system, _prompts(job, system, condition), job.suite.new_tokens, dense, condition)
    except UnfitError as reason:
        for name in ("prefill_seconds", "decode_seconds_per_token"):
            job.record.put(f"{name}/{condition}", None, str(reason))
        return
    rounds.put(job.record, done, condition)


def _prompts(job: Job, system: System, condition: str = "") -> list[Tensor]:
    """The run's prompts, cut so that the new tokens fit behind them."""
    given = sharing.prompts(job.out, system.device, condition)
    length = max(1, given[0].shape[1] - job.suite.new_tokens)
    return [prompt[:, :length] for prompt in given]


def stray(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """A fresh process of the dense model beside the dense worker: how far it strays from it for no reason at all."""
    job = Job(out, suite, pipeline, system)
    rounds.share_cores(torch.get_num_threads())
    dense = job.load()
    with Client(socket, family="AF_UNIX") as worker:
        for condition in ("", *job.suite.conditions):
            done = rounds.rounds(dense, _prompts(job, dense, condition), job.suite.new_tokens, worker, condition)
            part = f"/{condition}" if condition else ""
            for name, found in zip(("prefill_seconds", "decode_seconds"), rounds.log_ratios(done), strict=True):
                for kept, figure in zip(("strays", "strays_stderr"), found, strict=True):
                    job.record.samples.setdefault(f"{kept}/{name}{part}", []).append(round(figure, 6))
    results.save(job.record, job.out)


def serve(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """The dense worker: one round of plain decoding for each request, on the prompts that the candidate uses."""
    job = Job(out, suite, pipeline, system)
    rounds.share_cores(torch.get_num_threads())
    dense = job.load()
    given = {condition: _prompts(job, dense, condition) for condition in ("", *job.suite.conditions)}
    one_round(dense, given[""][0], job.suite.new_tokens)
    with Listener(socket, family="AF_UNIX") as listener:
        while True:
            with listener.accept() as candidate:
                try:
                    rounds.answer(dense, given, job.suite.new_tokens, candidate)
                except (EOFError, ConnectionError):
                    continue
