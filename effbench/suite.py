"""What is asked of a run: a model, pipelines, tasks, text and the conditions of measuring."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from effbench import models, protocols
from effbench.errors import UsageError
from effbench.registry import suggest

if TYPE_CHECKING:
    from effbench.measure.tasks import Asking

LATER = ("num_fewshot", "apply_chat_template", "task_data", "conditions", "dense_runs")
"""Fields that older records do not know; left out of the settings where they ask for nothing."""

COUNTS = ("limit", "threads", "batch", "prompt_tokens", "new_tokens", "rounds", "dense_runs", "timeout_seconds")


@dataclass(frozen=True)
class Suite:
    """One question, complete.

    techniques: pipelines, each a row; the dense model is always the first one. tasks: lm-eval names; empty with a
    reference model means the reference tasks. text, calibration: files (see `effbench.data`); a reference model
    has its own. protocol, window: how that text is cut and counted (see `effbench.protocols`). num_fewshot,
    apply_chat_template, task_data: how tasks are asked, and a folder with their items (see `effbench.measure.tasks`).
    limit: at most so many items of each task and windows of text. batch, prompt_tokens, new_tokens, rounds: what is
    timed, and how often. conditions: further batches and prompts that are timed, as "8x512". dense_runs: processes of
    the dense model that are timed against the dense worker, to see how far times stray. timeout_seconds: for each
    step of one row.
    """

    name: str = "custom"
    model: str = "ref-1m"
    techniques: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    text: str | None = None
    calibration: str | None = None
    protocol: str = protocols.DOCUMENT
    window: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    task_data: str | None = None
    limit: int | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    threads: int | None = None
    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 48
    rounds: int = 16
    conditions: tuple[str, ...] = ()
    dense_runs: int = 6
    timeout_seconds: int = 1800
    seed: int = 0
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise UsageError(f"{name} must be a whole number, got {value!r}")
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num_fewshot must be at least 0, got {self.num_fewshot}")
        if self.new_tokens < 2:
            raise UsageError(f"new_tokens must be at least 2, one to be timed after the first; got {self.new_tokens}")
        protocols.check(self.protocol, self.window)
        if self.protocol != protocols.DOCUMENT and self.text is None:
            raise UsageError(f"the protocol {self.protocol} needs a text to cut: give one with --text FILE")
        _ = self.timed
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"device must be auto, cpu or cuda, got {self.device!r}")

    @property
    def timed(self) -> dict[str, tuple[int, int]]:
        """The batch and the prompt's tokens of each further condition.

        Raises `UsageError` for one that is not written so.
        """
        found = {}
        for condition in self.conditions:
            batch, _, tokens = condition.partition("x")
            if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
                raise UsageError(
                    f"a condition is written BATCHxTOKENS, as 8x512 for 8 prompts of 512; got {condition!r}"
                )
            found[condition] = (int(batch), int(tokens))
        return found

    @property
    def rows_at_once(self) -> int:
        """How many rows are applied and scored side by side: two on a CPU, if there is memory for two."""
        if self.device != "cpu" or self.threads == 1:
            return 1
        size = models.weights_bytes(self.model)
        return 2 if 0 < 12 * size < psutil.virtual_memory().available else 1

    @property
    def asking(self) -> Asking:
        """How its tasks are asked."""
        from effbench.measure.tasks import Asking

        return Asking(self.num_fewshot, self.apply_chat_template, self.task_data)

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same for two rows to be comparable; machine and pipelines are not part of it."""
        content = asdict(self)
        for name in ("name", "techniques", "seed", "timeout_seconds"):
            del content[name]
        for name in LATER:
            if content[name] == getattr(Suite, name):
                del content[name]
        content["tasks"] = list(self.tasks)
        if self.conditions:
            content["conditions"] = list(self.conditions)
        return content


DEFAULT = "reference"
"""The suite that is run when no technique is asked for."""


def ask(
    model: str | None = None, techniques: Sequence[str] | None = None, suite: str | None = None, **changes: Any
) -> Suite:
    """A question as users put it: a suite, by name or file, with some of its fields changed.

    Without a suite and without techniques it is the default suite; `None` leaves a field as it is.
    Raises `UsageError` as `load` does, and for a field that there is not.
    """
    if suite is None and techniques is None:
        suite = DEFAULT
    known = [f.name for f in fields(Suite)]
    for name in changes:
        if name not in known:
            raise UsageError(f"a run has no option {name!r}{suggest(name, known)} (it has: {', '.join(known)})")
    changes |= {"model": model, "techniques": None if techniques is None else tuple(techniques)}
    base = load(suite) if suite else Suite()
    return replace(base, **{name: value for name, value in changes.items() if value is not None})


def names() -> dict[str, Path]:
    """The suites that come with effbench."""
    package = import_module("effbench.leaderboards")
    found = [path for folder in package.__path__ for path in Path(folder).glob("*/suite.toml")]
    return {path.parent.name: path for path in sorted(found)}


def load(name_or_path: str, **changes: Any) -> Suite:
    """A suite by name or from a TOML file, with some of its fields changed; a change to `None` is no change.

    Raises `UsageError` where there is none, or a field is unknown or of the wrong type.
    """
    path = names().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        hint = suggest(name_or_path, list(names()))
        raise UsageError(f"no suite {name_or_path!r}{hint}; give one of {', '.join(names())} or a TOML file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise UsageError(f"{path} is not TOML ({reason})") from None
    content.setdefault("name", path.parent.name if path.name == "suite.toml" else path.stem)
    known = {f.name: f for f in fields(Suite)}
    for key, value in content.items():
        if key not in known:
            hint = suggest(key, list(known))
            raise UsageError(f"{path} has an unknown field {key!r}{hint}; known: {', '.join(known)}")
        if key in ("techniques", "tasks", "conditions"):
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise UsageError(f"{path}: {key} must be a list of strings, got {value!r}")
            content[key] = tuple(value)
    try:
        return replace(Suite(**content), **{key: value for key, value in changes.items() if value is not None})
    except TypeError as reason:
        raise UsageError(f"{path}: a field has a value of the wrong type ({reason})") from None
