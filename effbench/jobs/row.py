"""The row that a worker works at: its suite, its record so far, its system and its text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effbench import models, results, store
from effbench.data import WINDOW, Data, FileSource, Source, Windows, WorldSource
from effbench.measure.host import machine
from effbench.results import Record
from effbench.suite import Suite
from effbench.technique import System


class Job:
    """One job for one row."""

    def __init__(self, out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
        suite["techniques"], suite["tasks"] = tuple(suite["techniques"]), tuple(suite["tasks"])
        self.suite, self.out, self.pipeline = Suite(**suite), Path(out), pipeline
        self.system_folder = Path(system) if system else None
        fresh = Record(self.suite.name, self.suite.model, pipeline, self.suite.seed, self.suite.settings)
        path = results.path_of(fresh, self.out)
        self.record = results.load(path) if path.is_file() else fresh
        if not self.record.provenance:
            self.record.provenance = {**results.provenance(), "machine": machine()}

    def dense_record(self) -> Record | None:
        """The dense row as far as it has come."""
        path = results.path_of(replace(self.record, pipeline="dense"), self.out)
        return results.load(path) if path.is_file() else None

    def dense(self) -> System:
        """The model as it is, in the run's dtype."""
        suite = self.suite
        trust = models.Trust(suite.allow_pickle, suite.trust_remote_code)
        return models.load(suite.model, suite.dtype, suite.device, trust)

    def load(self) -> System:
        """The system of this row."""
        return self.dense() if self.system_folder is None else store.load(self.system_folder, self.suite.device)

    def windows(self, system: System) -> Windows | None:
        """The text that is evaluated; `None` if there is none."""
        source = source_for(self.suite, system)
        return source.evaluation(min(system.context, WINDOW), self.suite.limit) if source else None

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
    device = system.device  # and not the system: what a technique leaves behind has to be able to go

    def lend(name: str) -> System:
        return models.load(name, suite.dtype, device, trust)

    return Data(source_for(suite, system), min(system.context, WINDOW), lend, suite.seed)


def prompts(suite: Suite, system: System, windows: Windows | None, length: int) -> list[Tensor]:
    """Prompts (batch, length), another one for each round: real text where there is some."""
    rng = np.random.default_rng(suite.seed)
    need = suite.batch * (suite.rounds + 1)
    rows = [window[:length] for window in windows.ids if len(window) >= length][:need] if windows else []
    if not rows:  # no text, or too short a one: a token's time does not depend on which token it is
        rows = list(rng.integers(0, system.config.vocab_size, (need, length)))
    rows = [rows[i % len(rows)] for i in range(need)]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(system.device)
    return list(ids.split(suite.batch))
