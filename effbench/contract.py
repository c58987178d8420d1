"""What every technique must do, whoever wrote it. Used by the tests and by `effbench check`.

Each check takes the technique to a small reference model and either passes or says in a sentence what is wrong. A
technique that does not fit that model says why, and that is a pass: the reason would be its row.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from transformers import Cache

from effbench import models, registry, store
from effbench.data import Data
from effbench.errors import EffbenchError, UnfitError
from effbench.jobs.applying import promised_bits
from effbench.jobs.row import data_for, source_for
from effbench.measure import memory
from effbench.measure.quality import scored_through_cache, window_logits
from effbench.suite import Suite
from effbench.technique import System, Technique
from effbench.toolbox.decoding import forward

MODEL = "ref-70k"
SMALL = {"steps": 2, "samples": 4, "batch_size": 2, "length": 64}
"""Standard options that are made small, so that a check takes seconds."""
UNTOUCHED = ("kv_cache", "speculative")
"""Families that leave the model alone: they change how it is run."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `problem` is empty where it passed."""

    name: str
    problem: str = ""
    note: str = ""


class Bench:
    """A technique on the contract's model."""

    def __init__(self, technique: Technique, family: str, model: str = MODEL, device: str = "cpu") -> None:
        self.technique, self.family, self.device = small(technique), family, device
        self._suite = Suite(model=model, device=device)

    def dense(self) -> System:
        """The model as it is."""
        return models.load(self._suite.model, self._suite.dtype, self.device)

    def data(self, system: System) -> Data:
        """Text and other models."""
        return data_for(self._suite, system)

    def applied(self, *others: Technique, first: bool = True) -> System:
        """The system after this technique and `others`, or after `others` and this one.

        Raises `UnfitError` where one of them does not fit.
        """
        system = self.dense()
        data = self.data(system)
        order = (self.technique, *others) if first else (*others, self.technique)
        for technique in order:
            torch.manual_seed(0)
            reason = technique.unfit(system)
            if reason is not None:
                raise UnfitError(reason)
            system = technique.apply(system, data)
            system.model.eval()
        return system

    def tokens(self, system: System, count: int = 96) -> torch.Tensor:
        """Held-out token ids (2, count)."""
        source = source_for(self._suite, system)
        if source is None:
            ids = torch.randint(0, system.config.vocab_size, (2, count), generator=torch.Generator().manual_seed(0))
        else:
            ids = torch.stack([torch.from_numpy(window) for window in source.evaluation(count, 2).ids])
        return ids.to(system.device)

    def logits(self, system: System) -> torch.Tensor:
        """What the system predicts, through its cache where it has one of its own."""
        return window_logits(system, self.tokens(system), through_cache=scored_through_cache(system), chunk=16)


def small(technique: Technique, limits: dict[str, int] = SMALL) -> Technique:
    """The technique with options that let it end in seconds."""
    known = {f.name: getattr(technique, f.name) for f in fields(technique)}
    return replace(technique, **{key: value for key, value in limits.items() if key in known and known[key] > value})


def check(technique: str | Technique, family: str = "", device: str = "cpu") -> list[Check]:
    """All checks of a technique, by name (built with its defaults) or as an object with its family.

    Raises `TechniqueError` for an unknown name.
    """
    if isinstance(technique, str):
        family = registry.entries()[technique].family if technique in registry.entries() else ""
        technique = registry.get(technique)()
    bench = Bench(technique, family, device=device)
    try:
        system = bench.applied()
    except UnfitError as reason:
        return [Check("applies", note=f"unfit for {MODEL}: {reason}")]
    except Exception as error:
        return [Check("applies", f"applying it to {MODEL} raised {type(error).__name__}: {error}")]
    del system
    results = [Check("applies")]
    checks = (_finite, _changes, _repeatable, _honest, _saves, _generates, _cache_is_charged, _untouched, _composes)
    for run in checks:
        name = run.__name__.strip("_").replace("_", " ")
        try:
            results.extend(Check(name, problem, note) for problem, note in run(bench))
        except Exception as error:
            results.append(Check(name, f"{type(error).__name__}: {error}"))
    return results


Outcome = Iterator[tuple[str, str]]


def _finite(bench: Bench) -> Outcome:
    """Finite logits."""
    logits = bench.logits(bench.applied())
    yield ("" if bool(torch.isfinite(logits).all()) else "some logits are not finite"), ""


def _changes(bench: Bench) -> Outcome:
    """Something is another than in the dense system."""
    dense, system = bench.dense(), bench.applied()
    same = unchanged(dense, system) and torch.equal(bench.logits(dense), bench.logits(system))
    yield ("nothing is another than before: give a reason in unfit where nothing can be done" if same else ""), ""


def unchanged(dense: System, system: System) -> bool:
    """Whether `system` stores as many bytes as the dense one and runs in the same way; logits remain to be seen."""
    ways = [(type(s.new_cache), type(s.generate), s.parts.keys()) for s in (dense, system)]
    return ways[0] == ways[1] and memory.stored_bytes(dense) == memory.stored_bytes(system)


def _repeatable(bench: Bench) -> Outcome:
    """The same seed gives the same system."""
    same = torch.equal(bench.logits(bench.applied()), bench.logits(bench.applied()))
    yield ("" if same else "two runs with one seed give different logits; draw from a generator seeded by `seed`"), ""


def _honest(bench: Bench) -> Outcome:
    """Nothing lives outside parameters and buffers; what is promised is compared with what is stored."""
    dense = bench.dense()
    others = memory.others(dense)
    del dense
    system = bench.applied()
    stored = memory.stored_bytes(system)
    hidden = memory.hidden_bytes(system, others)
    if memory.hides(hidden, stored):
        yield f"{hidden:,} bytes of tensors live outside the model's parameters and buffers ({stored:,} bytes)", ""
    bench.logits(system)
    after = memory.stored_bytes(system)
    if after != stored:
        yield f"stored bytes change by running it: {stored:,} before and {after:,} after a pass", ""
    dense_bytes = memory.stored_bytes(bench.dense())
    promised = promised_bits([bench.technique], 16.0)
    simulated = bool(promised) and promised[0] < 16 and stored >= dense_bytes
    yield "", "simulated: nothing is smaller than the dense model" if simulated else ""


def _saves(bench: Bench) -> Outcome:
    """Saved and loaded it gives the same logits and stores the same bytes."""
    system = bench.applied()
    before, stored = bench.logits(system), memory.stored_bytes(system)
    with tempfile.TemporaryDirectory() as folder:
        store.save(system, Path(folder) / "system", "check")
        loaded = store.load(Path(folder) / "system", bench.device)
        if not torch.equal(bench.logits(loaded), before):
            yield "saved and loaded it gives other logits; what it computes with must be parameters and buffers", ""
        if memory.stored_bytes(loaded) != stored:
            yield f"stores {stored:,} bytes, and {memory.stored_bytes(loaded):,} once saved and loaded", ""
    yield "", ""


def _generates(bench: Bench) -> Outcome:
    """Generating fills a cache from `system.new_cache`."""
    system = bench.applied()
    given: list[Cache] = []
    make: Callable[[], Cache] = system.new_cache

    def spy() -> Cache:
        given.append(make())
        return given[-1]

    prompt = bench.tokens(system)[:1, :24]
    system.new_cache = spy
    generation = system.generate(system, prompt, 8)
    if not any(memory.cache_bytes(cache) for cache in given):
        yield "generate does not keep its keys and values in a cache from system.new_cache()", ""
    if not torch.equal(generation.ids[:, :24], prompt) or generation.ids.shape[1] != 32:
        yield f"generate must give the prompt and 8 new tokens, it gave shape {tuple(generation.ids.shape)}", ""
    yield "", ""


def _cache_is_charged(bench: Bench) -> Outcome:
    """The cache's tensors show all the storage that they keep alive."""
    system = bench.applied()
    cache = system.new_cache()
    ids = bench.tokens(system, 320)
    with torch.inference_mode():
        for start in range(0, 320, 64):
            forward(system.model, ids[:, start : start + 64], cache, start)
    held, shown = memory.cache_bytes(cache), memory.cache_shown_bytes(cache)
    problem = f"the cache shows {shown:,} bytes of keys and values and keeps {held:,} alive; copy what is kept"
    yield (problem if held > 1.05 * shown + 4096 else ""), ""


def _untouched(bench: Bench) -> Outcome:
    """A technique of how to run the model leaves the model alone."""
    if bench.family not in UNTOUCHED:
        yield "", ""
        return
    same = _digest(bench.dense().model) == _digest(bench.applied().model)
    yield ("" if same else f"a {bench.family} technique must leave the model's tensors as they are"), ""


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _composes(bench: Bench) -> Outcome:
    """With one technique of every other family, in both orders, it works or says why not."""
    for other in _one_of_each_family(bench.family):
        for first in (True, False):
            pair = ("it", other) if first else (other, "it")
            try:
                system = bench.applied(small(registry.get(other)()), first=first)
                if not bool(torch.isfinite(bench.logits(system)).all()):
                    yield f"{pair[0]} before {pair[1]} gives logits that are not finite", ""
            except EffbenchError as reason:
                yield "", f"{pair[0]} before {pair[1]}: {reason}"
            except Exception as error:
                yield f"{pair[0]} before {pair[1]} raised {type(error).__name__}: {error}", ""


def _one_of_each_family(own: str) -> list[str]:
    chosen: dict[str, str] = {}
    for name in registry.names():
        chosen.setdefault(registry.entries()[name].family, name)
    return [name for family, name in chosen.items() if family != own]


def passed(results: list[Check]) -> bool:
    """Whether no check found a problem."""
    return not any(result.problem for result in results)
