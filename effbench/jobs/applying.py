"""Applying a pipeline: what it costs, what its result stores, and whether it hides anything."""

from __future__ import annotations

import time
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effbench import models, registry, results, store
from effbench.data import Data
from effbench.errors import PackageError, RecordError, UnfitError
from effbench.jobs.row import Job, data_for
from effbench.measure import memory
from effbench.measure.energy import meter
from effbench.results import Record
from effbench.technique import System, Technique
from effbench.toolbox.walk import matrices

HIDDEN_SHARE, HIDDEN_BYTES = 0.001, 65536
"""Live tensor bytes beside the stored ones that are not held against a technique: odds and ends of libraries."""


def apply_pipeline(system: System, pipeline: str, data: Data) -> tuple[System, list[Technique]]:
    """The system after each technique in turn, and the techniques.

    Raises `UnfitError` with the technique's reason where one does not fit.
    """
    techniques = registry.parse(pipeline, data.seed)
    for (name, _), technique in zip(registry.split(pipeline), techniques, strict=True):
        torch.manual_seed(data.seed)
        reason = technique.unfit(system)
        if reason is None:
            try:
                system = technique.apply(system, data)
                system.model.eval()
            except UnfitError as unfit:
                reason = str(unfit)
        if reason is not None:
            raise UnfitError(f"{name}: {reason}")
    return system, techniques


def apply(out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
    """Apply the pipeline, save the system, and record its cost and its size."""
    job = Job(out, suite, pipeline, system)
    record = job.record
    dense = job.dense()
    record.provenance["model_hash"] = digest = _digest(dense)
    first = job.dense_record()
    if first and first.provenance.get("model_hash") not in (digest, None):
        raise RecordError(
            f"the weights of {record.model} are not those that this folder's dense row was measured with; "
            "give another folder with --out"
        )
    weights = {name: (_checksum(linear.weight), linear.weight.numel()) for name, linear in matrices(dense.model)}
    parameters = sum(p.numel() for p in dense.model.parameters())
    dense_bits = 8.0 * next(dense.model.parameters()).dtype.itemsize
    own = memory.storages(memory.stored_tensors(dense))
    others = [t for t in memory.live_tensors() if not (memory.storages([t]).keys() & own.keys())]
    data = data_for(job.suite, dense)
    energy = meter(job.suite.device)
    memory.reset_peak()
    energy.start()
    start = time.perf_counter()
    try:
        result, techniques = apply_pipeline(dense, pipeline, data)
        del dense
        record.cost = {
            "seconds": round(time.perf_counter() - start, 3),
            "peak_bytes": memory.peak_bytes(),
            "tokens": data.tokens,
            "joules": energy.stop(),
        }
        hidden, stored = memory.hidden_bytes(result, others), memory.stored_bytes(result)
    except (UnfitError, PackageError) as reason:
        record.status, record.reason = "unfit", str(reason)
        results.save(record, job.out)
        return
    if hidden > max(HIDDEN_BYTES, HIDDEN_SHARE * stored):
        record.status = "failed"
        record.reason = (
            f"it keeps {hidden:,} bytes of tensors alive outside the model's parameters and buffers, so its stored "
            f"bytes ({stored:,}) would not be what it needs"
        )
        results.save(record, job.out)
        return
    _record_size(record, result, weights, parameters, dense_bits)
    record.put("promised_bits_per_weight", promised_bits(techniques, dense_bits), "its options promise no bits")
    if job.system_folder is not None:
        store.save(result, job.system_folder, pipeline)
    record.measured["apply"] = record.cost["seconds"] or 0.0
    results.save(record, job.out)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)


def _digest(system: System) -> str:
    """A fingerprint of all parameters."""
    content = [(name, _checksum(tensor)) for name, tensor in system.model.named_parameters()]
    return f"{zlib.crc32(repr(content).encode()):08x}"


def _record_size(
    record: Record, system: System, weights: dict[str, tuple[int, int]], parameters: int, dense_bits: float
) -> None:
    """Stored bytes, and bits per weight of the dense model's matrices that were changed or removed."""
    record.put("stored_bytes", memory.stored_bytes(system))
    saved = (Path(record.model).expanduser() / models.SAVED).is_file()  # packed weights are no parameters to count
    bits = None if saved else 8 * memory.stored_bytes(system) / parameters
    record.put("bits_per_weight_model", bits, "it came compressed, and its dense weights are not counted any more")
    present = dict(system.model.named_modules())
    plain = dict(matrices(system.model))
    changed_weights = changed_bytes = 0
    for name, (checksum, count) in weights.items():
        if name in plain and _checksum(plain[name].weight) == checksum and plain[name].weight.numel() == count:
            continue
        changed_weights += count
        changed_bytes += memory.module_bytes(present[name]) if name in present else 0
    whole = sum(count for _, count in weights.values())
    record.put("compressed_share", changed_weights / whole if whole else None, "it came without plain weight matrices")
    bits = 8 * changed_bytes / changed_weights if changed_weights else None
    record.put("bits_per_weight", bits, "no weight matrix was changed")


def promised_bits(techniques: list[Technique], dense_bits: float) -> float | None:
    """Bits per weight that the options promise, by their standard names; `None` if they promise none.

    `keep` and `sparsity` scale what is there, a pattern such as 2:4 is its own sparsity, `bits` or
    `packing` replaces what a weight takes. Cache techniques speak of other bits.
    """
    share, bits, promised = 1.0, dense_bits, False
    for technique in techniques:
        if ".kv_cache." in type(technique).__module__:
            continue
        options = {f.name: getattr(technique, f.name) for f in fields(technique)}
        if "keep" in options:
            share, promised = share * options["keep"], True
        pattern = options.get("pattern", "unstructured")
        if pattern != "unstructured":
            zeros, run = (int(part) for part in pattern.split(":"))
            share, promised = share * (1 - zeros / run), True
        elif "sparsity" in options:
            share, promised = share * (1 - options["sparsity"]), True
        stored = options.get("bits", options.get("packing"))
        if stored is not None:
            bits, promised = float(stored), True
    return share * bits if promised else None
