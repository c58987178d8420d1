"""lm-eval's tasks by name: which there are, and how they are asked."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from effbench import registry
from effbench.errors import TaskError
from effbench.measure.task_data import local
from effbench.registry import suggest

REFERENCE = Path(next(iter(import_module("effbench.tasks").__path__)))
FEWSHOT_SEED = 1234
"""lm-eval's own, so that the same examples are drawn."""


@dataclass(frozen=True)
class Asking:
    """How tasks are asked.

    num_fewshot: examples before each item; `None`: as many as the task says. chat_template: whether items are
    turns of a chat, as the tokenizer's template writes them. data: a folder with the tasks' items (see
    `effbench.measure.task_data`).
    """

    num_fewshot: int | None = None
    chat_template: bool = False
    data: str | None = None


PLAINLY = Asking()
"""As each task says, of the items that it names."""


def task_names() -> list[str]:
    """The tasks that come with effbench, by file name."""
    return list(registry.tasks())


def check_tasks(names: Sequence[str], asking: Asking = PLAINLY) -> None:
    """Raises `TaskError` for a task that neither effbench nor the installed lm-eval has, and for items that are not
    where they are said to be."""
    if not set(names) <= set(task_names()):
        known = set(task_manager(names).all_tasks)
        for name in names:
            if name not in known:
                raise TaskError(
                    f"no task {name!r}{suggest(name, sorted(known))} (`effbench list tasks` shows ours, "
                    "`lm-eval ls tasks` lm-eval's)"
                )
    if asking.data is not None:
        with quiet():
            load_tasks(names, asking)


def task_manager(names: Sequence[str]) -> Any:
    """lm-eval's task manager, which knows these names if it can.

    lm-eval has thousands of tasks, and to index them all takes seconds: where files or folders are called like the
    names, only theirs are indexed.
    """
    ours = _indexed((REFERENCE,))
    if set(names) <= set(ours.all_tasks):
        return ours
    homes = {home for name in names for home in _homes().get(name, ())}
    # of two tasks with one name lm-eval takes the first it finds, and of two indexed folders the last
    some = _indexed((*sorted(homes, reverse=True), REFERENCE))
    if set(names) <= set(some.all_subtasks):
        return some
    return _indexed((_root(), REFERENCE))


def _root() -> Path:
    """Where lm-eval's own tasks are."""
    from lm_eval import tasks

    return Path(tasks.__file__).parent


@cache
def _homes() -> dict[str, set[Path]]:
    """The folders of lm-eval's tasks that are called like a name, or hold a file that is."""
    found: dict[str, set[Path]] = {}
    for folder, _, files in os.walk(_root()):
        called = [os.path.basename(folder), *(file[:-5] for file in files if file.endswith(".yaml"))]
        for name in called:
            found.setdefault(name, set()).add(Path(folder))
    return found


@cache
def _indexed(folders: tuple[Path, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def load_tasks(names: Sequence[str], asking: Asking = PLAINLY) -> dict[str, Any]:
    """lm-eval's tasks, groups taken apart, ready to be asked.

    Raises `TaskError` where a task's items cannot be had, or there is nothing to draw examples from.
    """
    try:
        with local(Path(asking.data) if asking.data else None):
            loaded: dict[str, Any] = task_manager(names).load(list(names))
    except (ConnectionError, FileNotFoundError) as reason:
        raise TaskError(
            f"the data of {', '.join(names)} cannot be had without a network ({reason}); give a folder with them "
            "(--task-data DIR)"
        ) from None
    except ValueError as reason:
        if "Duplicate task" not in str(reason):
            raise
        raise TaskError(f"a task was asked for twice ({reason}); leave one of them out of --tasks") from None
    for name, task in loaded["tasks"].items():
        _set_fewshot(name, task, asking.num_fewshot)
    return loaded


def _set_fewshot(name: str, task: Any, count: int | None) -> None:
    """As lm-eval does: a task that says 0 means it."""
    own = task.get_config("num_fewshot")
    if count is not None and own != 0:
        task.set_config(key="num_fewshot", value=count)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    have = len(getattr(sampler, "df", ())) if sampler is not None else shots
    if shots > have:
        raise TaskError(
            f"task {name!r} is to be asked with {shots} examples, and there are {have} to draw them from; "
            "add its training split, or ask with --num-fewshot 0"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's progress and remarks."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        yield
