"""Timing a system beside the dense worker, and its memory in a process of its own."""

from __future__ import annotations

import json
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np

from effbench.errors import EffbenchError, UnfitError
from effbench.jobs.row import Job, prompts
from effbench.measure import memory
from effbench.measure.energy import meter
from effbench.measure.speed import one_round
from effbench.suite import Suite
from effbench.technique import System


def speed(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """Memory of the system in a process of its own, then its time in rounds interleaved with the dense worker's."""
    job = Job(out, suite, pipeline, system)
    before = memory.resident_bytes()
    memory.reset_peak()
    loaded = job.load()
    job.measure("speed", lambda: _time(job, loaded, before, Path(socket)))


def _time(job: Job, system: System, before: int, socket: Path) -> None:
    record, suite = job.record, job.suite
    given = prompts(suite, system, job.windows(system), _prompt_length(suite, system))
    energy = meter(suite.device)
    try:
        one_round(system, given[0], suite.new_tokens)
    except UnfitError as reason:
        for name in ("prefill_seconds", "decode_seconds_per_token", "joules_per_token"):
            record.put(name, None, str(reason))
        return
    peak = memory.peak_bytes()
    record.put("peak_bytes", peak)
    record.put("peak_growth_bytes", peak - before)
    record.put("peak_device_bytes", memory.peak_device_bytes(system.device), "no GPU was used")
    stored = memory.stored_bytes(system)
    if stored != record.values["stored_bytes"]:
        raise EffbenchError(
            f"stores {stored:,} bytes after a forward pass, and {record.values['stored_bytes']:,.0f} when it was saved"
        )
    prefill, decode, dense_prefill, dense_decode, joules = [], [], [], [], 0.0
    new = passes = proposed = accepted = 0
    with Client(str(socket), family="AF_UNIX") as dense:
        for number, prompt in enumerate(given[1:]):
            dense.send_bytes(json.dumps(number + 1).encode())
            theirs = json.loads(dense.recv_bytes())
            energy.start()
            first, each, generation = one_round(system, prompt, suite.new_tokens)
            joules += energy.stop() or 0.0
            prefill.append(first)
            decode.append(each)
            dense_prefill.append(theirs[0])
            dense_decode.append(theirs[1])
            new += generation.ids.shape[1] - prompt.shape[1]
            passes, proposed = passes + generation.passes, proposed + generation.proposed
            accepted += generation.accepted
    record.samples.update(prefill_seconds=prefill, decode_seconds=decode)
    record.samples.update(dense_prefill_seconds=dense_prefill, dense_decode_seconds=dense_decode)
    record.put("prefill_seconds", float(np.median(prefill)))
    record.put("decode_seconds_per_token", float(np.median(decode)))
    record.put("tokens_per_pass", new / (passes + len(given) - 1))
    record.put("acceptance_rate", accepted / proposed if proposed else None, "nothing is drafted")
    total = sum(len(prompt) for prompt in given[1:]) * (suite.new_tokens + 1)
    record.put("joules_per_token", joules / total if energy.source else None, energy.reason)
    record.provenance["energy_source"] = energy.source


def _prompt_length(suite: Suite, system: System) -> int:
    return max(1, min(suite.prompt_tokens, system.context - suite.new_tokens))


def serve(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """The dense worker: one round of plain decoding for each request, on the prompts that the candidate uses."""
    job = Job(out, suite, pipeline, system)
    dense = job.dense()
    given = prompts(job.suite, dense, job.windows(dense), _prompt_length(job.suite, dense))
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
