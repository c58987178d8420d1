"""lm-eval's multiple-choice questions, built and encoded once: all that is left for a system is to be run on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable, hash_string

from effbench.errors import TaskError
from effbench.measure.encoding import Choices, Encoder
from effbench.measure.tasks import PLAINLY, Asking, load_tasks
from effbench.results import digest, files


@dataclass
class TaskResult:
    """What one task gave.

    correct: 1 or 0 for each item; `None` where items are not right or wrong. chance: the accuracy of guessing among
    the choices. items_hash: the items' fingerprint. correct_norm: the same as `correct` if each choice's
    log-likelihood is divided by its characters; `None` where the task does not ask for that. metrics: further
    figures of the whole task, by column.
    """

    correct: list[int] | None
    chance: float | None
    items_hash: str
    correct_norm: list[int] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The share of correct items."""
        return None if self.correct is None else sum(self.correct) / len(self.correct)

    @property
    def accuracy_norm(self) -> float | None:
        """The share of items that are correct by what a choice's characters weigh."""
        return None if self.correct_norm is None else sum(self.correct_norm) / len(self.correct_norm)


@dataclass(frozen=True)
class Questions:
    """The items of several tasks. The choices of an item, and the items of a task, follow each other.

    right (choices,): whether lm-eval counts a choice as right. sizes (choices,): its characters. counts: for each task
    how many choices each item has. hashes: each task's items' fingerprint. normed: the tasks that are also scored by
    the character. others: the tasks that only lm-eval itself can score, since they are no plain multiple choice.
    order: all tasks.
    """

    choices: Choices
    right: np.ndarray
    sizes: np.ndarray
    counts: dict[str, np.ndarray]
    hashes: dict[str, str]
    normed: tuple[str, ...]
    others: tuple[str, ...]
    order: tuple[str, ...]

    @classmethod
    def joined(cls, parts: Sequence[Questions]) -> Questions:
        """Those of all parts, in their order.

        Raises `TaskError` for a task that is in two of them.
        """
        order = tuple(name for part in parts for name in part.order)
        for name in order:
            if order.count(name) > 1:
                raise TaskError(f"task {name!r} was asked for twice; leave one of the two out of --tasks")
        return cls(
            Choices.joined([part.choices for part in parts]),
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            {name: counts for part in parts for name, counts in part.counts.items()},
            {name: digest for part in parts for name, digest in part.hashes.items()},
            tuple(name for part in parts for name in part.normed),
            tuple(name for part in parts for name in part.others),
            order,
        )

    def results(self, values: np.ndarray) -> dict[str, TaskResult]:
        """Each task's result from the log-likelihoods (choices,): of an item's choices the likeliest one is taken."""
        found, start = {}, 0
        for name, counts in self.counts.items():
            ends = start + counts.cumsum()
            items = [slice(end - count, end) for count, end in zip(counts.tolist(), ends.tolist(), strict=True)]
            correct = [int(self.right[item][values[item].argmax()]) for item in items]
            normed = [int(self.right[item][(values[item] / self.sizes[item]).argmax()]) for item in items]
            chance = sum(1 / count for count in counts.tolist()) / len(counts)
            start = int(ends[-1])
            found[name] = TaskResult(correct, chance, self.hashes[name], normed if name in self.normed else None)
        return found

    def save(self, path: Path) -> None:
        """Write it as arrays, all or nothing."""
        names = {
            "tasks": list(self.counts),
            "hashes": self.hashes,
            "normed": self.normed,
            "others": self.others,
            "order": self.order,
        }
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
            sizes=self.sizes,
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
        lists = (tuple(names[name]) for name in ("normed", "others", "order"))
        return cls(choices, stored["right"], stored["sizes"], by_task, names["hashes"], *lists)


def fingerprint(tokenizer: Any, name: str, limit: int | None, asking: Asking) -> str:
    """Questions with the same one are the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    kind = type(tokenizer).__qualname__
    template = [tokenizer.chat_template] if asking.chat_template else None
    items = digest(files(Path(asking.data))) if asking.data else None
    content = [kind, how, tokenizer.bos_token, tokenizer.eos_token, template, name, limit, asking.num_fewshot, items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def build(encoder: Encoder, names: Sequence[str], limit: int | None = None, asking: Asking = PLAINLY) -> Questions:
    """The first `limit` items of each task.

    Raises `TaskError` where a task's items cannot be had.
    """
    tasks, others, requests = load_tasks(names, asking)["tasks"], [], []
    right: list[bool] = []
    sizes: list[int] = []
    counts, hashes, normed = {}, {}, []
    for name, task in tasks.items():
        items = _items(task, encoder, limit, asking) if _is_plain(task) else None
        marks = [_right(task, item) for item in items] if items else [None]
        if items is None or None in marks:
            others.append(name)
            continue
        right += [mark for item in marks for mark in item or []]
        sizes += [len(choice) for item in items for choice in task.doc_to_choice(item[0].doc)]
        requests += [request for item in items for request in item]
        counts[name] = np.array([len(item) for item in items], np.int64)
        options = {"indent": 2, "default": handle_non_serializable, "ensure_ascii": False}
        documents = [hash_string(json.dumps(item[0].doc, **options)) for item in items]
        hashes[name] = hashlib.sha256("".join(documents).encode()).hexdigest()[:16]
        normed += [name] if "acc_norm" in task._metric_fn_list else []
    choices = encoder.encode(requests)
    return Questions(
        choices, np.array(right, bool), np.array(sizes), counts, hashes, tuple(normed), tuple(others), tuple(tasks)
    )


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


def _items(task: Any, encoder: Encoder, limit: int | None, asking: Asking) -> list[list[Any]]:
    """The requests of each item, as lm-eval makes them."""
    chat = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "chat_template": encoder.apply_chat_template,
        "tokenizer_name": encoder.tokenizer_name,
    }
    task.build_all_requests(limit=limit, rank=0, world_size=1, **(chat if asking.chat_template else {}))
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
        found = task.process_results(document, answers)
        if len(item[place].args) != 2 or {found["acc"], found.get("acc_norm", found["acc"])} != {marks[place]}:
            return None
    return marks
