"""What the workers do, each in its own process: apply, score, time. Every function here takes JSON and writes records.

    apply    the dense model -> the pipeline -> a saved system, its cost and its size
    quality  the saved system -> perplexity and divergence, accuracy, cache bytes
    speed    the saved system -> its memory, and its time in rounds interleaved with the dense worker's
    serve    the dense worker
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import fields
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import models, registry, results, store
from effbench.data import Data, FileSource, Source, Windows, WorldSource
from effbench.errors import EffbenchError, PackageError, UnfitError
from effbench.measure import memory
from effbench.measure.energy import meter
from effbench.results import Record
from effbench.suite import Suite
from effbench.technique import CachePolicy, System, Technique
from effbench.toolbox.decoding import forward
from effbench.toolbox.walk import matrices

HIDDEN_SHARE, HIDDEN_BYTES = 0.001, 65536
"""Live tensor bytes beside the stored ones that are not held against a technique: odds and ends of libraries."""


class Job:
    """The row that a worker works at: its suite, its record so far, the text."""

    def __init__(self, out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
        suite["techniques"], suite["tasks"] = tuple(suite["techniques"]), tuple(suite["tasks"])
        self.suite, self.out, self.pipeline = Suite(**suite), Path(out), pipeline
        self.system_folder = Path(system) if system else None
        fresh = Record(self.suite.name, self.suite.model, pipeline, self.suite.seed, self.suite.settings)
        path = results.path_of(fresh, self.out)
        self.record = results.load(path) if path.is_file() else fresh
        if not self.record.provenance:
            from effbench.measure.host import machine

            self.record.provenance = {**results.provenance(), "machine": machine()}

    def dense(self) -> System:
        """The model as it is, in the run's dtype."""
        suite = self.suite
        trust = models.Trust(suite.allow_pickle, suite.trust_remote_code)
        return models.load(suite.model, suite.dtype, suite.device, trust)

    def load(self) -> System:
        """The system of this row."""
        return self.dense() if self.system_folder is None else store.load(self.system_folder, self.suite.device)

    def measure(self, name: str, work: Callable[[], None]) -> None:
        """Do a measure unless it is finished, and save the record after it."""
        if name in self.record.measured:
            return
        start = time.perf_counter()
        work()
        self.record.measured[name] = round(time.perf_counter() - start, 3)
        results.save(self.record, self.out)


def source_for(suite: Suite, system: System) -> Source | None:
    """Where this run's text comes from; `None` if there is none."""
    if suite.text is not None:
        calibration = Path(suite.calibration) if suite.calibration else None
        return FileSource(Path(suite.text), system.tokenizer, calibration)
    return WorldSource(system.tokenizer) if _knows_world(system) else None


def _knows_world(system: System) -> bool:
    """Whether a model speaks the synthetic world's language, also after it was compressed and saved."""
    from effbench.reference.world import World

    return set(World().vocabulary) == set(system.tokenizer.get_vocab())


def data_for(suite: Suite, system: System) -> Data:
    """The door to text and other models that techniques are given."""
    trust = models.Trust(suite.allow_pickle, suite.trust_remote_code)

    def lend(name: str) -> System:
        return models.load(name, suite.dtype, system.device, trust)

    return Data(source_for(suite, system), system.context, lend, suite.seed)


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
    weights = {name: (_checksum(linear), linear.weight.numel()) for name, linear in matrices(dense.model)}
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


def _checksum(linear: nn.Linear) -> int:
    return zlib.crc32(linear.weight.detach().contiguous().cpu().view(torch.uint8).numpy().data)


def _record_size(
    record: Record, system: System, weights: dict[str, tuple[int, int]], parameters: int, dense_bits: float
) -> None:
    """Stored bytes, and bits per weight of the dense model's matrices that were changed or removed."""
    record.put("stored_bytes", memory.stored_bytes(system))
    record.put("bits_per_weight_model", 8 * memory.stored_bytes(system) / parameters)
    present = dict(system.model.named_modules())
    plain = dict(matrices(system.model))
    changed_weights = changed_bytes = 0
    for name, (checksum, count) in weights.items():
        if name in plain and _checksum(plain[name]) == checksum and plain[name].weight.numel() == count:
            continue
        changed_weights += count
        changed_bytes += memory.module_bytes(present[name]) if name in present else 0
    record.put("compressed_share", changed_weights / sum(count for _, count in weights.values()))
    bits = 8 * changed_bytes / changed_weights if changed_weights else None
    record.put("bits_per_weight", bits, "no weight matrix was changed")


def promised_bits(techniques: list[Technique], dense_bits: float) -> float | None:
    """Bits per weight that the options promise, by their standard names; `None` if they promise none.

    `keep` and `sparsity` scale what is there, a pattern such as 2:4 is its own sparsity, `bits` replaces what a
    weight takes. Cache techniques speak of other bits.
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
        if "bits" in options:
            bits, promised = float(options["bits"]), True
    return share * bits if promised else None


def quality(out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
    """Score the system: text, tasks, cache."""
    job = Job(out, suite, pipeline, system)
    loaded = job.load()
    source = source_for(job.suite, loaded)
    windows = source.evaluation(loaded.context, job.suite.limit) if source else None
    reference = job.out / "dense" / "log_probabilities.npy"
    if pipeline == "dense" and "perplexity" in job.record.measured and windows and not reference.exists():
        _score_text(Record("", "", "dense", 0), loaded, windows, reference)
    job.measure("perplexity", lambda: _score_text(job.record, loaded, windows, reference))
    job.measure("accuracy", lambda: _score_tasks(job, loaded))
    job.measure("cache", lambda: _fill_cache(job, loaded, windows))


def _score_text(record: Record, system: System, windows: Windows | None, path: Path) -> None:
    from effbench.measure.quality import DenseLogProbabilities, score

    columns = ("perplexity", "nll_per_token", "bits_per_byte", "kl_to_dense", "top1_agreement")
    if windows is None:
        for name in columns:
            record.put(name, None, "no text was given (--text FILE)")
        return
    dense = record.pipeline == "dense"
    vocabulary = system.config.vocab_size
    reference = DenseLogProbabilities(path, windows, vocabulary, write=dense) if dense or path.exists() else None
    found = score(system, windows, reference)
    if reference:
        reference.finish()
    record.put("nll_per_token", found.nll_per_token)
    record.put("perplexity", found.perplexity)
    record.put("bits_per_byte", found.bits_per_byte(windows.bytes_scored))
    tokens = found.compared_tokens
    why = "the dense model's log-probabilities take too much disk" if reference else "the dense model was not scored"
    record.put("kl_to_dense", sum(found.kl.values()) / tokens if tokens else None, why)
    record.put("top1_agreement", sum(found.agreed.values()) / tokens if tokens else None, why)
    record.samples["nll"] = [round(value, 6) for value in found.nats]
    record.samples["tokens"] = list(found.tokens)
    for name in found.kind_nats:
        count = sum(found.kind_tokens[name])
        if count:
            record.put(f"nll_per_token/{name}", sum(found.kind_nats[name]) / count)
            record.samples[f"nll/{name}"] = [round(value, 6) for value in found.kind_nats[name]]
            record.samples[f"tokens/{name}"] = list(found.kind_tokens[name])
    record.provenance["data_hash"] = windows.digest


def _score_tasks(job: Job, system: System) -> None:
    record, names = job.record, job.suite.tasks
    if not names:
        record.put("accuracy", None, "no tasks were asked for (--tasks)")
        return
    from effbench.measure.accuracy import evaluate

    found = evaluate(system, names, job.suite.limit)
    for name, result in found.items():
        record.put(f"accuracy/{name}", result.accuracy)
        record.put(f"accuracy_chance/{name}", result.chance)
        record.samples[f"correct/{name}"] = list(result.correct)
    record.put("accuracy", float(np.mean([result.accuracy for result in found.values()])))
    record.put("accuracy_chance", float(np.mean([result.chance for result in found.values()])))


@torch.inference_mode()
def _fill_cache(job: Job, system: System, windows: Windows | None) -> None:
    """Bytes that the caches of the model and of its parts hold once they are full, for each token fed."""
    count = min(system.context, job.suite.prompt_tokens + job.suite.new_tokens)
    ids = _prompts(job.suite, system, windows, count)[0][:1]
    held = 0
    for model, cache in [
        (system.model, system.new_cache()),
        *((part, CachePolicy(part.config)()) for part in system.parts.values()),
    ]:
        for start in range(0, ids.shape[1], 64):
            forward(model, ids[:, start : start + 64], cache, start)
        held += memory.cache_bytes(cache)
    job.record.put("cache_bytes_per_token", held / ids.shape[1])
    job.record.samples["cache_tokens"] = [ids.shape[1]]


def _prompts(suite: Suite, system: System, windows: Windows | None, length: int) -> list[Tensor]:
    """Prompts (batch, length), another one for each round: real text where there is some."""
    rng = np.random.default_rng(suite.seed)
    need = suite.batch * (suite.rounds + 1)
    rows = [window[:length] for window in windows.ids if len(window) >= length][:need] if windows else []
    if not rows:  # no text, or too short a one: a token's time does not depend on which token it is
        rows = list(rng.integers(0, system.config.vocab_size, (need, length)))
    rows = [rows[i % len(rows)] for i in range(need)]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(system.device)
    return list(ids.split(suite.batch))


def speed(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """Memory of the system in a process of its own, then its time in rounds interleaved with the dense worker's."""
    job = Job(out, suite, pipeline, system)
    before = memory.resident_bytes()
    memory.reset_peak()
    loaded = job.load()
    job.measure("speed", lambda: _time(job, loaded, before, Path(socket)))


def _time(job: Job, system: System, before: int, socket: Path) -> None:
    from effbench.measure.speed import one_round

    record, suite = job.record, job.suite
    source = source_for(suite, system)
    windows = source.evaluation(system.context, suite.limit) if source else None
    prompts = _prompts(suite, system, windows, _prompt_length(suite, system))
    energy = meter(suite.device)
    try:
        one_round(system, prompts[0], suite.new_tokens)
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
        for number, prompt in enumerate(prompts[1:]):
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
    record.put("tokens_per_pass", new / (passes + len(prompts) - 1))
    record.put("acceptance_rate", accepted / proposed if proposed else None, "nothing is drafted")
    total = sum(len(prompt) for prompt in prompts[1:]) * (suite.new_tokens + 1)
    record.put("joules_per_token", joules / total if energy.source else None, energy.reason)
    record.provenance["energy_source"] = energy.source


def _prompt_length(suite: Suite, system: System) -> int:
    return max(1, min(suite.prompt_tokens, system.context - suite.new_tokens))


def serve(out: str, suite: dict[str, Any], pipeline: str, system: str, socket: str) -> None:
    """The dense worker: one round of plain decoding for each request, on the prompts that the candidate uses."""
    from effbench.measure.speed import one_round

    job = Job(out, suite, pipeline, system)
    dense = job.dense()
    source = source_for(job.suite, dense)
    windows = source.evaluation(dense.context, job.suite.limit) if source else None
    prompts = _prompts(job.suite, dense, windows, _prompt_length(job.suite, dense))
    one_round(dense, prompts[0], job.suite.new_tokens)
    with Listener(socket, family="AF_UNIX") as listener:
        while True:
            with listener.accept() as candidate:
                try:
                    while True:
                        number = json.loads(candidate.recv_bytes())
                        prefill, decode, _ = one_round(dense, prompts[number], job.suite.new_tokens)
                        candidate.send_bytes(json.dumps([prefill, decode]).encode())
                except (EOFError, ConnectionError):
                    continue
