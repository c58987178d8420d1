"""The question: what is asked of a run is made whole, checked before anything is measured, and answered.

run               a suite -> a folder of records (the rows are worked off by `effbench.schedule`)
apply_and_save    a model and a pipeline -> a saved system
applied           the same -> a system
"""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from effbench import models, registry, results
from effbench.errors import PackageError, RecordError, UsageError
from effbench.measure.host import usable_cores
from effbench.results import Record
from effbench.schedule import Progress, Schedule, Silent, record_for
from effbench.suite import Suite

if TYPE_CHECKING:
    from effbench.technique import System


def run(suite: Suite, out: Path | None = None, progress: Progress | None = None) -> Path:
    """Measure every pipeline of the suite, dense first; the folder with the records.

    A folder that holds some of this suite's rows is continued. Raises `UsageError` before anything is measured
    where the question is wrong, and `RecordError` where `out` cannot be written or holds rows of another question.
    """
    suite = resolve(suite)
    pipelines = check(suite)
    inputs = results.inputs(suite.model, suite.text, suite.calibration, suite.task_data)
    out = out or default_folder(suite, inputs)
    _prepare(out, suite, inputs)
    with _locked(out), tempfile.TemporaryDirectory(prefix="effbench-") as scratch:
        asked = {**asdict(suite), "techniques": pipelines, "inputs": inputs}
        results.write_atomically(out / "run.json", json.dumps(asked, indent=1) + "\n")
        rows = [record_for(out, suite, pipeline) for pipeline in pipelines]
        Schedule(suite, out, Path(scratch), rows, progress or Silent()).work()
    return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """No other run works in this folder.

    Raises `RecordError` where one does.
    """
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecordError(f"another run works in {out}; wait for it, or give another folder with --out") from None
        yield


def resolve(suite: Suite) -> Suite:
    """The suite with its automatic values filled in for this machine."""
    device = resolve_device(suite.device)
    threads = suite.threads or usable_cores()
    tasks = suite.tasks
    if not tasks and models.speaks_reference(suite.model) and suite.text is None:
        tasks = tuple(registry.tasks())
    dtype = models.saved_dtype(suite.model) or suite.dtype
    return replace(suite, device=device, threads=threads, tasks=tasks, dtype=dtype)


def resolve_device(asked: str) -> str:
    """The device that "auto" means here; raises `UsageError` for "cuda" where there is none."""
    if asked == "cpu":
        return asked
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UsageError("--device cuda was asked for, but torch sees no CUDA device (`effbench doctor` says more)")
    return "cuda" if available else "cpu"


def check(suite: Suite) -> list[str]:
    """The pipelines in canonical form, dense first, each once.

    Raises a `UsageError` for whatever is wrong with the question, before anything is measured.
    """
    trust = models.Trust(suite.allow_pickle, suite.trust_remote_code)
    models.check(suite.model, trust)
    models.examine(suite.model, trust)
    models.check_dtype(suite.dtype, suite.device)
    pipelines = ["dense"]
    for asked in suite.techniques:
        try:
            pipeline = registry.canonical(asked)
        except PackageError:
            pipeline = asked  # its row will say what to install
        if pipeline not in pipelines:
            pipelines.append(pipeline)
    _check_text(suite)
    _check_window(suite, trust)
    if not set(suite.tasks) <= set(registry.tasks()) or suite.task_data is not None:
        from effbench.measure.tasks import check_tasks

        check_tasks(suite.tasks, suite.asking)
    return pipelines


def _check_text(suite: Suite) -> None:
    from effbench.data import read_documents

    for path in (suite.text, suite.calibration):
        if path is not None:
            read_documents(Path(path))
    if suite.calibration is not None and suite.text is None:
        raise UsageError("--calibration needs --text FILE beside it, the text that is evaluated")
    if suite.text is not None and models.is_reference(suite.model):
        from effbench.data import FileSource
        from effbench.reference import folder

        tokenizer = models.load_tokenizer(str(folder(suite.model.partition("@")[0])))
        FileSource(Path(suite.text), tokenizer)


def _check_window(suite: Suite, trust: models.Trust) -> None:
    """Raises `TextError` where the model's context is too short for the windows asked for, if that can be known."""
    from effbench.protocols import DOCUMENT, window_tokens

    if suite.protocol != DOCUMENT or suite.window:
        context = models.context(suite.model, trust)
        if context:
            window_tokens(suite.protocol, suite.window, context)


def default_folder(suite: Suite, inputs: dict[str, str]) -> Path:
    """A folder for exactly this question, these inputs and this code, so that asking again continues it."""
    import hashlib

    question = json.dumps([suite.settings, suite.techniques, suite.seed, inputs])
    model = Path(suite.model).name or "model"
    return Path("runs") / f"{suite.name}-{model}-{hashlib.sha256(question.encode()).hexdigest()[:8]}"


def _prepare(out: Path, suite: Suite, inputs: dict[str, str]) -> None:
    """Make the folder and see that what lies in it belongs to this question."""
    for path in (out / "records").glob("*.json") if out.is_dir() else []:
        _same_question(out, results.load(path), suite, inputs)
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise RecordError(f"cannot write to {out} ({reason.strerror}); choose another folder with --out") from None


def _same_question(out: Path, record: Record, suite: Suite, inputs: dict[str, str]) -> None:
    there = {**record.settings, **record.provenance.get("inputs", {})}
    for name, value in {**suite.settings, **inputs}.items():
        if there.get(name) != value:
            raise RecordError(
                f"{out} holds rows measured with {name}={there.get(name)!r}, and now {name}={value!r} is asked for; "
                "give another folder with --out, or delete this one"
            )


def apply_and_save(
    model: str,
    pipeline: str,
    folder: Path,
    *,
    text: str | None = None,
    calibration: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    trust: models.Trust = models.CAREFUL,
) -> None:
    """The result taken home: apply a pipeline to a model and save the system to `folder`.

    Raises `UsageError` for a wrong question and `UnfitError` where the pipeline does not fit the model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecordError(f"{folder} exists and is not empty; give a new folder with --save")
    from effbench import store

    pipeline = registry.canonical(pipeline)
    suite = Suite(model=model, text=text, calibration=calibration, seed=seed, dtype=dtype, device=device)
    system = applied(suite, pipeline, trust)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        store.save(system, folder, pipeline)
    except OSError as reason:
        raise RecordError(f"cannot write to {folder} ({reason.strerror}); choose another folder with --save") from None


def applied(suite: Suite, pipeline: str, trust: models.Trust = models.CAREFUL) -> System:
    """The suite's model after a pipeline, with the suite's texts.

    Raises `UsageError` for a wrong question and `UnfitError` where the pipeline does not fit the model.
    """
    models.check(suite.model, trust)
    models.examine(suite.model, trust)
    pipeline = registry.canonical(pipeline)
    _check_text(suite)
    from effbench.jobs.applying import apply_pipeline
    from effbench.jobs.row import data_for

    system = models.load(suite.model, suite.dtype, suite.device, trust)
    return apply_pipeline(system, pipeline, data_for(suite, system))[0]
