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
from effbench.jobs import sharing
from effbench.jobs.row import Job, data_for, source_for
from effbench.measure import memory
from effbench.measure.counters import meter
from effbench.measure.overlap import Overlap
from effbench.measure.promise import nominal
from effbench.results import Record
from effbench.technique import System, Technique
from effbench.toolbox.experts import ExpertList, expert_slices
from effbench.toolbox.stored import StoredModule, remarks
from effbench.toolbox.walk import as_linear, blocks, is_matrix, weights


def apply_pipeline(system: System, pipeline: str, data: Data) -> tuple[System, list[Technique]]:
    """The system after each technique in turn, and the techniques.

    Raises `UnfitError` with the technique's reason where one does not fit.
    """
    techniques = registry.parse(pipeline, data.seed)
    for (name, _), technique in zip(registry.split(pipeline), techniques, strict=True):
        torch.manual_seed(data.seed)
        try:
            reason = technique.unfit(system)
            if reason is None:
                system = technique.apply(system, data)
                system.model.eval()
        except UnfitError as unfit:
            reason = str(unfit)
        if reason is not None:
            raise UnfitError(f"{name}: {reason}")
    return system, techniques


def apply(out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
    """Apply the pipeline, save the system, and record its cost and its size.

    The dense row, which comes first, also makes what all rows share.
    """
    job = Job(out, suite, pipeline, system)
    record = job.record
    dense = job.dense()
    foreign = _foreign(dense)
    if pipeline == "dense":
        finished = "apply" in record.measured  # what all rows share was no longer there
        if finished and not foreign:
            store.save(dense, job.system_folder, pipeline)
        record.provenance["prompts"] = sharing.write(job.out, job.suite, dense, source_for(job.suite, dense))
        if finished:
            return
    elif foreign:
        _end(job, "unfit", f"{foreign}, so a changed one cannot be saved and loaded")
        return
    _check_weights(job, dense)
    before, others = Before(dense), memory.others(dense)
    data = data_for(job.suite, dense)
    scored = sharing.windows(job.out)
    overlap = Overlap(scored.ids) if scored else None
    data.watch = overlap.meet if overlap else None
    energy = meter(job.suite.device)
    memory.reset_peak()
    energy.start()
    start = time.perf_counter()
    try:
        result, techniques = apply_pipeline(dense, pipeline, data)
    except (UnfitError, PackageError) as reason:
        _end(job, "unfit", str(reason))
        return
    device = dense.device
    del dense
    joules = energy.stop()
    record.cost = {
        "seconds": round(time.perf_counter() - start, 3),
        "peak_bytes": memory.peak_bytes(),
        "peak_device_bytes": memory.peak_device_bytes(device),
        "tokens": data.tokens,
        "joules": joules if job.is_alone else None,
    }
    if record.cost["joules"] is None:
        record.missing["cost_joules"] = energy.why or "rows are applied side by side, and the counter is the machine's"
    hidden, stored = memory.hidden_bytes(result, others), memory.stored_bytes(result)
    if memory.hides(hidden, stored):
        _end(
            job,
            "failed",
            f"it keeps {hidden:,} bytes of tensors alive outside the model's parameters and buffers, so its stored "
            f"bytes ({stored:,}) would not be what it needs",
        )
        return
    _record_size(record, result, before)
    promises = promised_bits(techniques, before.bits)
    record.put("promised_bits_per_weight", promises[0] if promises else None, "its options promise no bits")
    record.samples["promised_bits_without_one"] = promises[1:]
    modules = [module for part in (result.model, *result.parts.values()) for module in part.modules()]
    for kind in ("simulated", "unpacked"):
        record.provenance[kind] = remarks(modules, kind)
    record.values |= nominal(techniques)
    _record_overlap(record, overlap)
    if not foreign:
        store.save(result, job.system_folder, pipeline)
    saved = None if foreign else memory.folder_bytes(job.system_folder)
    record.put("saved_bytes", saved, f"{foreign}, so it cannot be saved")
    record.measured["apply"] = record.cost["seconds"] or 0.0
    results.save(record, job.out)


def _record_overlap(record: Record, overlap: Overlap | None) -> None:
    """How much of the evaluated text was read."""
    record.put("overlap", overlap.share if overlap else None, "no text was given (--text FILE)")
    if overlap and overlap.share:
        read = overlap.tokens_read
        record.samples["overlap"] = [sum(tokens > 0 for tokens in read), len(read)]


def _foreign(dense: System) -> str:
    """What of a model is not made by transformers or by us; empty if nothing is."""
    model: Any = dense.model
    if type(model).__module__.startswith("transformers_modules"):
        return "the model runs code of its own"
    return "the model came packed in layers of another library" if getattr(model, "hf_quantizer", None) else ""


class Before:
    """What has to be known of the dense model once it is changed."""

    def __init__(self, dense: System) -> None:
        self.weights = _contents(dense)
        inside = blocks(dense.model)[1].parameters()
        self.block_weights = sum(tensor.numel() for tensor in inside if tensor.ndim > 1)
        self.parameters = sum(tensor.numel() for tensor in dense.model.parameters())
        self.bits = 8.0 * next(dense.model.parameters()).dtype.itemsize

    def changed(self, system: System) -> set[str]:
        """The matrices that are others now, or gone."""
        now = _contents(system)
        return {name for name, content in self.weights.items() if now.get(name) != content}

    def share(self, system: System) -> float | None:
        """The share of the blocks' weights that are others now, or gone; `None` if no plain matrix was there."""
        changed = sum(self.weights[name][1] for name in self.changed(system))
        return changed / self.block_weights if self.weights else None


def _contents(system: System) -> dict[str, tuple[int, int]]:
    """For each plain matrix in the blocks what is in it, and how many weights."""
    return {name: (_checksum(weight), weight.numel()) for name, weight in weights(system.model)}


def _end(job: Job, status: str, reason: str) -> None:
    job.record.status, job.record.reason = status, reason
    results.save(job.record, job.out)


def _check_weights(job: Job, dense: System) -> None:
    """Note which weights these are.

    Raises `RecordError` where the dense row was measured with others.
    """
    job.record.provenance["model_hash"] = digest = _digest(dense)
    first = job.dense_record()
    if first and first.provenance.get("model_hash") not in (digest, None):
        raise RecordError(
            f"the weights of {job.record.model} are not those that this folder's dense row was measured with; "
            "give another folder with --out"
        )


def _checksum(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten()  # a single column may be contiguous and still have another stride
    return zlib.crc32(flat.cpu().view(torch.uint8).numpy().data)


def _digest(system: System) -> str:
    """A fingerprint of all parameters."""
    content = [(name, _checksum(tensor)) for name, tensor in system.model.named_parameters()]
    return f"{zlib.crc32(repr(content).encode()):08x}"


def _record_size(record: Record, system: System, before: Before) -> None:
    """Stored bytes, and bits per weight of the dense model's matrices that were changed or removed."""
    stored = memory.stored_bytes(system)
    record.put("stored_bytes", stored)
    record.put("parts_bytes", memory.parts_bytes(system))
    # packed weights are no parameters to count
    packed = not before.weights or (Path(record.model).expanduser() / models.SAVED).is_file()
    bits = None if packed else 8 * stored / before.parameters
    record.put("bits_per_weight_model", bits, "it came compressed, and its dense weights are not counted any more")
    changed = before.changed(system)
    changed_weights = sum(before.weights[name][1] for name in changed)
    record.put("compressed_share", before.share(system), "it came without plain weight matrices")
    kept = before.weights.keys() - changed
    changed_bytes = sum(count for name, count in _in_place(system) if name not in kept)
    bits = 8 * changed_bytes / changed_weights if changed_weights else None
    record.put("bits_per_weight", bits, "no weight matrix was changed")


def _in_place(system: System) -> list[tuple[str, int]]:
    """The bytes of all that does a matrix's work in the blocks: plain matrices, and what replaced them, whole.

    A matrix that several blocks share counts once.
    """
    prefix, layers = blocks(system.model)
    found: list[tuple[str, int]] = []
    shared: set[int] = set()
    experts = "none"
    for name, module in layers.named_modules(prefix=prefix):
        if any(name.startswith(f"{outer}.") for outer, _ in found[-1:]):
            continue
        if isinstance(module, ExpertList):
            experts = name
        elif is_matrix(module) and name.startswith(f"{experts}."):  # perhaps a view of what all experts share
            found.append((name, as_linear(module).weight.nbytes))
        elif is_matrix(module):
            weight = id(module.weight)
            found.append((name, 0 if weight in shared else memory.module_bytes(module)))
            shared.add(weight)
        elif isinstance(module, StoredModule):
            found.append((name, memory.module_bytes(module)))
        found += [(f"{name}.{inside}", matrix.nbytes) for inside, matrix in expert_slices(module)]
    return found


def promised_bits(techniques: list[Technique], dense_bits: float) -> list[float]:
    """Bits per weight that the options promise, by their standard names; then without each of the techniques in turn.

    Empty if they promise none. `keep` and `sparsity` scale what is there, a pattern such as 2:4 is its own sparsity,
    `bits` or `packing` replaces what a weight takes. Where single weights are left out, one bit for each says which
    stay.
    Cache techniques speak of other bits.
    """
    promises = [promise for technique in techniques if (promise := _promise(technique)) != (1.0, None, 0.0)]
    if not promises:
        return []
    without = [promises[:place] + promises[place + 1 :] for place in range(len(promises))]
    return [_together(some, dense_bits) for some in (promises, *without)]


def _together(promises: list[tuple[float, float | None, float]], dense_bits: float) -> float:
    share, bits, mask = 1.0, dense_bits, 0.0
    for factor, replaced, places in promises:
        share, bits, mask = share * factor, bits if replaced is None else replaced, max(mask, places)
    return share * bits + mask


def _promise(technique: Technique) -> tuple[float, float | None, float]:
    """The share of a matrix that stays, the bits that a weight takes from here on, and those that say where it is."""
    if ".kv_cache." in type(technique).__module__:
        return 1.0, None, 0.0
    options = {f.name: getattr(technique, f.name) for f in fields(technique)}
    pattern = options.get("pattern", "unstructured")
    if pattern != "unstructured":
        zeros, run = (int(part) for part in pattern.split(":"))
        kept = 1 - zeros / run
    else:
        kept = 1 - float(options.get("sparsity", 0.0))
    return options.get("keep", 1.0) * kept, technique.promised_bits(), float(kept < 1 and "pattern" in options)
