"""Records as a run would write them, made of numbers that are known beforehand; deterministic."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from effbench.results import Record, save

TASKS = ("ref_copying", "ref_retrieval")
TOKENS, WINDOWS, ITEMS, ROUNDS = 500, 64, 200, 8
SETTINGS = {
    "model": "ref-1m",
    "tasks": list(TASKS),
    "text": None,
    "dtype": "bfloat16",
    "device": "cpu",
    "threads": 2,
    "limit": None,
    "batch": 1,
    "prompt_tokens": 128,
    "new_tokens": 48,
    "rounds": ROUNDS,
}


def record(
    pipeline: str,
    *,
    nats: float = 0.0,
    stored: int = 2_000_000,
    bits: float | None = 16.0,
    promised: float | None = None,
    speed: float = 1.0,
    noise: int = 0,
) -> Record:
    """A finished row: `nats` above dense, `speed` times as fast, timed under the load that `noise` stands for."""
    text, own, load = random.Random("text"), random.Random(pipeline), random.Random(f"{pipeline} {noise}")
    row = Record("reference", "ref-1m", pipeline, 0, dict(SETTINGS), "ok")
    dense = [TOKENS * (2.3 + text.gauss(0, 0.2)) for _ in range(WINDOWS)]
    row.samples = {
        "nll": [value + TOKENS * nats * (1 + own.gauss(0, 0.2)) for value in dense],
        "tokens": [TOKENS] * WINDOWS,
    }
    mean = sum(row.samples["nll"]) / (TOKENS * WINDOWS)
    row.put("nll_per_token", mean)
    row.put("perplexity", math.exp(mean))
    row.put("kl_to_dense", nats)
    row.put("top1_agreement", 1 - min(0.9, nats))
    for task in TASKS:
        items = random.Random(task)
        row.samples[f"correct/{task}"] = [int(items.random() < 0.8 - min(0.7, nats)) for _ in range(ITEMS)]
        row.put(f"accuracy/{task}", sum(row.samples[f"correct/{task}"]) / ITEMS)
        row.put(f"accuracy_chance/{task}", 0.125)
    row.put("accuracy", sum(row.values[f"accuracy/{task}"] or 0 for task in TASKS) / len(TASKS))
    row.put("accuracy_chance", 0.125)
    row.put("stored_bytes", stored)
    row.put("bits_per_weight", bits, "no weight matrix was changed")
    row.put("promised_bits_per_weight", promised, "its options promise no bits")
    row.put("cache_bytes_per_token", 512.0)
    row.put("peak_growth_bytes", 40e6 * (1 + load.gauss(0, 0.1)))
    row.put("joules_per_token", None, "no energy counter on this machine (no RAPL)")
    for kind, seconds in (("prefill", 0.004), ("decode", 0.001)):
        slowed = [math.exp(abs(load.gauss(0, 0.5))) for _ in range(ROUNDS)]
        row.samples[f"dense_{kind}_seconds"] = [seconds * by for by in slowed]
        row.samples[f"{kind}_seconds"] = [seconds / speed * by * math.exp(load.gauss(0, 0.05)) for by in slowed]
        if pipeline == "dense":
            row.samples[f"strays/{kind}_seconds"] = [load.gauss(0, 0.02) for _ in range(5)]
    row.put("prefill_seconds", sorted(row.samples["prefill_seconds"])[ROUNDS // 2])
    row.put("decode_seconds_per_token", sorted(row.samples["decode_seconds"])[ROUNDS // 2])
    row.cost = {"seconds": 0.5, "peak_bytes": 400_000_000, "tokens": 0, "joules": None}
    row.provenance = {"data_hash": "0123", "commit": "c0ffee", "machine": {"cpu": "A Processor", "cores": 2}}
    return row


def ended(pipeline: str, status: str, reason: str) -> Record:
    """A row that came to no figures."""
    return Record("reference", "ref-1m", pipeline, 0, dict(SETTINGS), status, reason)


def write(folder: Path, noise: int = 0, change: Callable[[Record], Record | None] | None = None) -> Path:
    """A folder of records; `change` may replace one, or leave it out by returning `None`."""
    rows = [
        record("dense", bits=None, noise=noise),
        record("rtn:bits=4", nats=0.03, stored=700_000, bits=4.5, promised=4, speed=1.8, noise=noise),
        record("magnitude:sparsity=0.5", nats=0.2, promised=8, noise=noise),
        record("sink_window:window=124", nats=0.00001, bits=None, noise=noise),
        record("rtn:bits=4+sink_window:window=124+draft:model=ref-70k", nats=0.03, bits=4.5, promised=4, noise=noise),
        ended("rtn:bits=4+magnitude", "unfit", "magnitude: no plain weight matrix is left to compress"),
        ended("bitnet", "failed", "applying failed: RuntimeError: shapes do not match"),
    ]
    kept = [done for row in rows if (done := change(row) if change else row) is not None]
    for row in kept:
        save(row, folder)
    (folder / "run.json").write_text(json.dumps({"techniques": [row.pipeline for row in rows]}))
    return folder
