"""lm-eval's multiple-choice questions, built and encoded once: all that is left for a system is to be run on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable, hash_string

from effbench.errors import TaskError
from effbench.measure.encoding import Choices, Encoder

REFERENCE = Path(next(iter(import_module("effbench.tasks").__path__)))


@dataclass
class TaskResult:
    """What one task gave: 1 or 0 for each item, the accuracy of guessing among its choices, the items' fingerprint."""

    correct: list[int]
    chance: float | None
    items_hash: str

    @property
    def accuracy(self) -> float:
        """The share of correct items."""
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Questions:
    """The items of several tasks. The choices of an item, and the items of a task, follow each other.

    right (choices,): whether lm-eval counts a choice as right. counts: for each task how many choices each item has.
    hashes: each task's items' fingerprint. others: the tasks that only lm-eval itself can score, since they are no
    plain multiple choice. order: all tasks.
    """

    choices: Choices
    right: np.ndarray
    counts: dict[str, np.ndarray]
    hashes: dict[str, str]
    others: tuple[str, ...]
    order: tuple[str, ...]

    def results(self, values: np.ndarray) -> dict[str, TaskResult]:
        """Each task's result from the log-likelihoods (choices,): of an item's choices the likeliest one is taken."""
        found, start = {}, 0
        for name, counts in self.counts.items():
            ends = start + counts.cumsum()
            items = [(end - count, end) for count, end in zip(counts.tolist(), ends.tolist(), strict=True)]
            correct = [int(self.right[first + int(values[first:end].argmax())]) for first, end in items]
            chance = sum(1 / count for count in counts.tolist()) / len(counts)
            found[name], start = TaskResult(correct, chance, self.hashes[name]), int(ends[-1])
        return found

    def save(self, path: Path) -> None:
        """Write it as arrays, all or nothing."""
        names = {"tasks": list(self.counts), "hashes": self.hashes, "others": self.others, "order": self.order}
        lengths = [len(context) for context in self.choices.contexts]
        beside = path.with_name(f"partial-{os.getpid()}-{path.name}")
        np.savez(
            beside,
            contexts=np.concatenate([*self.choices.contexts, np.zeros(0, np.int64)]).astype(np.int32),
            context_lengths=np.array(lengths, np.int32),
            context_of=self.choices.context_of.astype(np.int32),
            tokens=self.choices.tokens.astype(np.int32),
            lengths=self.choices.lengths.astype(np.int32),
            right=self.right,
            counts=np.concatenate([*self.counts.values(), np.zeros(0, np.int64)]).astype(np.int32),
            items=np.array([len(counts) for counts in self.counts.values()], np.int64),
            names=np.array(json.dumps(names)),
        )
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Questions:
        """What `save` wrote."""
        with np.load(path) as file:
            stored = {name: file[name] for name in file.files}
        names = json.loads(str(stored["names"]))
        whole = {name: stored[name].astype(np.int64) for name in ("contexts", "context_of", "tokens", "lengths")}
        contexts = np.split(whole["contexts"], stored["context_lengths"].cumsum())[:-1]
        choices = Choices(contexts, whole["context_of"], whole["tokens"], whole["lengths"])
        counts = np.split(stored["counts"].astype(np.int64), stored["items"].cumsum())[:-1]
        by_task = dict(zip(names["tasks"], counts, strict=True))
        return cls(choices, stored["right"], by_task, names["hashes"], tuple(names["others"]), tuple(names["order"]))


def task_manager(names: Sequence[str]) -> Any:
    """lm-eval's task manager; its own thousands of tasks are indexed only if one is asked for."""
    from lm_eval.tasks import TaskManager

    ours = TaskManager(include_path=str(REFERENCE), include_defaults=False)
    if set(names) <= set(ours.all_tasks):
        return ours
    return TaskManager(include_path=str(REFERENCE))


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks, to be asked without examples.

    Raises `TaskError` where a task's data cannot be had.
    """
    try:
        loaded: dict[str, Any] = task_manager(names).load(list(names))
    except (ConnectionError, FileNotFoundError) as reason:
        raise TaskError(f"the data of {', '.join(names)} cannot be had without a network ({reason})") from None
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def fingerprint(tokenizer: Any, names: Sequence[str], limit: int | None) -> str:
    """Questions with the same one are the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    kind = type(tokenizer).__qualname__
    content = [kind, how, tokenizer.bos_token, tokenizer.eos_token, list(names), limit]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def build(encoder: Encoder, names: Sequence[str], limit: int | None = None) -> Questions:
    """The first `limit` items of each task.

    Raises `TaskError` where a task's data cannot be had.
    """
    tasks, others, requests = load_tasks(names)["tasks"], [], []
    right: list[bool] = []
    counts, hashes = {}, {}
    for name, task in tasks.items():
        items = _items(task, limit) if _is_plain(task) else None
        marks = [_right(task, item) for item in items] if items else [None]
        if items is None or None in marks:
            others.append(name)
            continue
        right += [mark for item in marks for mark in item or []]
        requests += [request for item in items for request in item]
        counts[name] = np.array([len(item) for item in items], np.int64)
        options = {"indent": 2, "default": handle_non_serializable, "ensure_ascii": False}
        documents = [hash_string(json.dumps(item[0].doc, **options)) for item in items]
        hashes[name] = hashlib.sha256("".join(documents).encode()).hexdigest()[:16]
    choices = encoder.encode(requests)
    return Questions(choices, np.array(right, bool), counts, hashes, tuple(others), tuple(tasks))


def _is_plain(task: Any) -> bool:
    """Whether an item's result is that its likeliest choice is right, and nothing else."""
    return (
        isinstance(task, ConfigurableTask)
        and type(task).process_results is ConfigurableTask.process_results
        and task.OUTPUT_TYPE == "multiple_choice"
        and task.config.process_results is None
        and task.config.filter_list is None
        and task.config.repeats == 1
        and "acc" in task._metric_fn_list
        and "acc_mutual_info" not in task._metric_fn_list
    )


def _items(task: Any, limit: int | None) -> list[list[Any]]:
    """The requests of each item, as lm-eval makes them."""
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    found: dict[int, list[Any]] = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request)
    return [sorted(found[number], key=lambda request: request.idx) for number in sorted(found)]


def _right(task: Any, item: list[Any]) -> list[bool] | None:
    """Which choices of an item lm-eval counts as right; `None` where it does not agree, asked about two of them."""
    document = item[0].doc
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        names = task.doc_to_choice(document)
        gold = names.index(gold) if gold in names else -1
    wanted = set(gold) if isinstance(gold, list) else {gold}
    marks = [place in wanted for place in range(len(item))]
    for place in {marks.index(mark) for mark in set(marks)}:
        answers = [(0.0 if other == place else -1.0, False) for other in range(len(item))]
        if len(item[place].args) != 2 or task.process_results(document, answers)["acc"] != marks[place]:
            return None
    return marks
