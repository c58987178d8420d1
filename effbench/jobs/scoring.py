"""Scoring a system: text, tasks, cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effbench import results
from effbench.data import Windows
from effbench.jobs import sharing
from effbench.jobs.row import Job
from effbench.measure import divergence, memory
from effbench.measure.counters import Meter, meter
from effbench.measure.energy import above_idle
from effbench.results import Record
from effbench.technique import CachePolicy, System
from effbench.toolbox.decoding import forward

if TYPE_CHECKING:
    from effbench.measure.answers import Answers


def quality(out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
    """Score the system: text, tasks, cache."""
    job = Job(out, suite, pipeline, system)
    loaded = job.load()
    windows = sharing.windows(job.out)
    longest = max((len(ids) - 1 for ids in windows.ids), default=0) if windows else 0
    if loaded.context < longest:
        job.record.status = "unfit"
        job.record.reason = (
            f"its context of {loaded.context} tokens is shorter than the windows of {longest + 1} it is scored on"
        )
        results.save(job.record, job.out)
        return
    reference = sharing.folder(job.out) / "log_probabilities.npy"
    if pipeline == "dense" and "perplexity" in job.record.measured and windows and not reference.exists():
        _score_text(Record("", "", "dense", 0), loaded, windows, reference)
    job.measure("perplexity", lambda: _score_text(job.record, loaded, windows, reference))
    job.measure("accuracy", lambda: _score_tasks_metered(job, loaded))
    job.measure("cache", lambda: _fill_cache(job, loaded))


def _score_text(record: Record, system: System, windows: Windows | None, path: Path) -> None:
    from effbench.measure.quality import DenseLogProbabilities, score

    columns = (
        "perplexity",
        "nll_per_token",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "kl_to_dense",
        "top1_agreement",
    )
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
    for name, units in (("word_perplexity", windows.words_scored), ("byte_perplexity", windows.bytes_scored)):
        record.put(name, found.perplexity_per(units) if units else None, "the text has none")
    record.provenance["text"] = {
        "tokens": sum(found.tokens),
        "words": windows.words_scored,
        "bytes": windows.bytes_scored,
        "all_tokens": windows.text_tokens,
        "window": windows.window_tokens,
    }
    tokens = found.compared_tokens
    why = "its vocabulary has another width than the dense model's" if reference else "the dense model was not scored"
    record.put("kl_to_dense", sum(found.kl) / tokens if tokens else None, why)
    record.put("top1_agreement", sum(found.agreed) / tokens if tokens else None, why)
    if tokens and not dense:
        record.samples |= divergence.samples(found.divergences, found.agreed)
    record.samples["nll"] = [round(value, 6) for value in found.nats]
    record.samples["tokens"] = list(found.tokens)
    if windows.documents is not None:
        record.samples["documents"] = windows.documents.tolist()
    for name in found.kind_nats:
        count = sum(found.kind_tokens[name])
        if count:
            record.put(f"nll_per_token/{name}", sum(found.kind_nats[name]) / count)
            record.samples[f"nll/{name}"] = [round(value, 6) for value in found.kind_nats[name]]
            record.samples[f"tokens/{name}"] = list(found.kind_tokens[name])
    record.provenance["data_hash"] = windows.digest


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean([value for value in values if value is not None])) if values else None


def _score_tasks_metered(job: Job, system: System) -> None:
    """The tasks, and the energy of each correct answer."""
    known = _known(job)
    counter = meter(job.suite.device)
    if counter.source and not job.is_alone:
        counter = Meter(None, "rows are scored side by side, and the counter is the whole machine's")
    joules, idle = above_idle(counter, lambda: _score_tasks(job, system, known))
    record = job.record
    correct = sum(sum(items) for name, items in record.samples.items() if name.startswith("correct/"))
    why = counter.why or ("no answer was correct" if job.suite.tasks else record.missing["accuracy"])
    if known and known.asked:
        record.provenance["answers"] = {"asked": known.asked, "reused": known.reused}
    if known and known.reused:
        joules, why = None, f"{known.reused:,} of {known.asked:,} answers were known from an earlier run"
    record.samples["accuracy_idle_watts"] = idle
    record.put("joules_per_correct", joules / correct if joules is not None and correct else None, why)


def _known(job: Job) -> Answers | None:
    """What this very system has answered, in this folder or one beside it; `None` where there is nothing to know it by.

    A hub's model or one that cannot be saved is not looked at byte by byte.
    """
    from effbench.measure.answers import Answers, beside, system_name

    if not job.suite.tasks or not job.system_folder.is_dir():
        return None
    name = system_name(job.system_folder, job.suite.device)
    return Answers(job.out / "answers" / f"{name}.npz", beside(job.out, name))


def _score_tasks(job: Job, system: System, known: Answers | None) -> None:
    record, names = job.record, job.suite.tasks
    if not names:
        for column in ("accuracy", "accuracy_norm"):
            record.put(column, None, "no tasks were asked for (--tasks)")
        return
    from effbench.measure.accuracy import evaluate

    suite = job.suite
    asked = sharing.questions(job.out, suite, system)
    found = evaluate(system, names, suite.limit, asked, suite.asking, known)
    for name, result in found.items():
        for metric, value in result.metrics.items():
            record.put(f"{metric}/{name}", value)
        if result.correct is None:
            continue
        record.put(f"accuracy/{name}", result.accuracy)
        record.put(f"accuracy_chance/{name}", result.chance, "it does not offer choices")
        record.samples[f"correct/{name}"] = list(result.correct)
        if result.correct_norm is not None:
            record.put(f"accuracy_norm/{name}", result.accuracy_norm)
            record.samples[f"correct_norm/{name}"] = list(result.correct_norm)
    marked = [result for result in found.values() if result.correct is not None]
    record.put("accuracy", _mean([result.accuracy for result in marked]), "no task has items that are right or wrong")
    chances = [result.chance for result in marked]
    record.put("accuracy_chance", _mean(chances) if None not in chances else None, "some tasks do not offer choices")
    normed = [result.accuracy_norm for result in marked if result.accuracy_norm is not None]
    record.put("accuracy_norm", _mean(normed), "no task is scored by the character")
    record.provenance["items_hash"] = {name: result.items_hash for name, result in found.items()}


@torch.inference_mode()
def _fill_cache(job: Job, system: System) -> None:
    """Bytes that the caches of the model and of its parts hold once they are full, for each token fed."""
    ids = sharing.prompts(job.out, system.device)[0][:1]
    held = []
    for model, cache in [
        (system.model, system.new_cache()),
        *((part, CachePolicy(part.config)()) for part in system.parts.values()),
    ]:
        for start in range(0, ids.shape[1], 64):
            forward(model, ids[:, start : start + 64], cache, start)
        held.append(memory.cache_bytes(cache))
    job.record.put("cache_bytes_per_token", sum(held) / ids.shape[1])
    job.record.put("cache_bytes", sum(held))
    job.record.put("held_bytes", sum(held) + memory.stored_bytes(system))
    job.record.samples["cache_bytes"] = list(map(float, held))  # the model's own first
    job.record.samples["cache_tokens"] = [ids.shape[1]]
