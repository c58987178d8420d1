"""The row that a worker works at: its suite, its record so far, its system and its text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effbench import models, results, store
from effbench.data import Data, FileSource, Source, WorldSource
from effbench.measure.host import machine
from effbench.protocols import DOCUMENT, WINDOW
from effbench.reference import speaks_reference
from effbench.results import Record
from effbench.streams import StreamSource
from effbench.suite import Suite
from effbench.technique import System


class Job:
    """One job for one row."""

    def __init__(self, out: str, suite: dict[str, Any], pipeline: str, system: str) -> None:
        suite |= {name: tuple(suite[name]) for name in ("techniques", "tasks", "conditions")}
        self.suite, self.out, self.pipeline = Suite(**suite), Path(out), pipeline
        self.system_folder = Path(system)
        fresh = Record(self.suite.name, self.suite.model, pipeline, self.suite.seed, self.suite.settings)
        path = results.path_of(fresh, self.out)
        self.record = results.load(path) if path.is_file() else fresh
        if not self.record.provenance:
            question = self.suite
            asked = results.inputs(question.model, question.text, question.calibration, question.task_data)
            self.record.provenance = {**results.provenance(), "inputs": asked, "machine": machine()}

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
        """The system of this row, from where it was saved; one that cannot be, as it is loaded by its name.

        So is a dense model larger than the GPU: what is saved comes back to one device.
        """
        saved = (self.system_folder / models.SAVED).is_file()
        if self.pipeline == "dense" and models.is_spread(self.suite.model, self.suite.device):
            saved = False
        return store.load(self.system_folder, self.suite.device) if saved else self.dense()

    @property
    def is_alone(self) -> bool:
        """Whether no other row is worked on beside this one: then it has all of the run's threads."""
        return torch.get_num_threads() >= (self.suite.threads or 1)

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
        if suite.protocol != DOCUMENT:
            return StreamSource(Path(suite.text), system.tokenizer, calibration, suite.protocol)
        return FileSource(Path(suite.text), system.tokenizer, calibration)
    return WorldSource(system.tokenizer) if speaks_reference(system.tokenizer.get_vocab()) else None


def data_for(suite: Suite, system: System) -> Data:
    """The door to text and other models that techniques are given."""
    trust = models.Trust(suite.allow_pickle, suite.trust_remote_code)
    device = system.device  # and not the system: what a technique leaves behind has to be able to go

    def lend(name: str) -> System:
        return models.load(name, suite.dtype, device, trust)

    return Data(source_for(suite, system), min(system.context, WINDOW), lend, suite.seed)
