"""Timing a system beside the dense worker, and its memory in a process of its own."""

from __future__ import annotations

import json
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effbench.errors import EffbenchError, UnfitError
from effbench.jobs import sharing
from effbench.jobs.row import Job
from effbench.measure import energy, limits, memory, roofline
from effbench.measure.counters import meter
from effbench.measure.speed import one_round
from effbench.results import Record
from effbench.technique import System


def speed(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """Memory of the system in a process of its own, then its time in rounds interleaved with the dense worker's."""
    job = Job(out, suite, pipeline, system)
    before = memory.resident_bytes()
    memory.reset_peak()
    loaded = job.load()
    job.measure("speed", lambda: _time(job, loaded, before, Path(socket)))


COLUMNS = (
    "prefill_seconds",
    "decode_seconds_per_token",
    "tokens_per_pass",
    "acceptance_rate",
    *roofline.WORK,
    "idealized_seconds",
    *energy.COLUMNS,
    "peak_bytes",
    "peak_growth_bytes",
    "peak_device_bytes",
    "peak_device_reserved_bytes",
    "device_process_bytes",
)


def _time(job: Job, system: System, before: int, socket: Path) -> None:
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
    ours, theirs = [], []
    new = passes = proposed = accepted = 0
    with Client(str(socket), family="AF_UNIX") as dense:
        for number, prompt in enumerate(given[1:]):
            dense.send_bytes(json.dumps(number + 1).encode())
            theirs.append(json.loads(dense.recv_bytes()))
            prefill, decode, generation = one_round(system, prompt, suite.new_tokens)
            ours.append((prefill, decode))
            new += generation.ids.shape[1] - prompt.shape[1]
            passes, proposed = passes + generation.passes, proposed + generation.proposed
            accepted += generation.accepted
    _put_times(record, ours, theirs)
    record.put("tokens_per_pass", new / (passes + len(given) - 1))
    record.put("acceptance_rate", accepted / proposed if proposed else None, "nothing is drafted")
    threads = torch.get_num_threads()
    roofline.measure(record, system, given[1], suite.new_tokens, limits.known(system.device.type, threads))
    energy.measure(record, system, given[1], suite.new_tokens, meter(suite.device))


def _put_times(record: Record, ours: list[tuple[float, float]], theirs: list[list[float]]) -> None:
    """Seconds of this row and of dense, round by round.

    A round in which noise swallowed the time of the new tokens has none; where half of the rounds are so, there is
    no figure.
    """
    rounds = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if mine[1] > 0 and other[1] > 0]
    record.samples["prefill_seconds"] = [mine[0] for mine in ours]
    record.samples["dense_prefill_seconds"] = [other[0] for other in theirs]
    record.put("prefill_seconds", float(np.median([mine[0] for mine in ours])))
    if 2 * len(rounds) <= len(ours):
        why = "the new tokens take too little time beside their prompt; use more --new-tokens or fewer --prompt-tokens"
        record.put("decode_seconds_per_token", None, why)
        return
    record.samples["decode_seconds"] = [mine[1] for mine, _ in rounds]
    record.samples["dense_decode_seconds"] = [other[1] for _, other in rounds]
    record.put("decode_seconds_per_token", float(np.median(record.samples["decode_seconds"])))


def _prompts(job: Job, system: System) -> list[Tensor]:
    """The run's prompts, cut so that the new tokens fit behind them."""
    given = sharing.prompts(job.out, system.device)
    length = max(1, given[0].shape[1] - job.suite.new_tokens)
    return [prompt[:, :length] for prompt in given]


def serve(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """The dense worker: one round of plain decoding for each request, on the prompts that the candidate uses."""
    job = Job(out, suite, pipeline, system)
    dense = job.load()
    given = _prompts(job, dense)
    one_round(dense, given[0], job.suite.new_tokens)
    with Listener(socket, family="AF_UNIX") as listener:
        while True:
            with listener.accept() as candidate:
                try:
                    while True:
                        number = json.loads(candidate.recv_bytes())
                        prefill, decode, _ = one_round(dense, given[number], job.suite.new_tokens)
                        candidate.send_bytes(json.dumps([prefill, decode]).encode())
                except (EOFError, ConnectionError):
                    continue
