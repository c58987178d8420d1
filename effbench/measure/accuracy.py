"""Zero-shot accuracy through lm-eval, whose requests are answered by a `System`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

from effbench import registry
from effbench.errors import TaskError
from effbench.measure.quality import scored_through_cache, window_logits
from effbench.registry import suggest
from effbench.technique import System

REFERENCE = Path(next(iter(import_module("effbench.tasks").__path__)))
BATCH_TOKENS = 8192
"""Tokens in a batch of contexts."""


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


class SystemLM(TemplateLM):
    """lets lm-eval score a `System`.

    The choices of an item share their context: it is run once. Where all of them are single tokens nothing else
    has to be; longer ones are run as context and choice. Systems with a cache policy of their own are scored
    through their cache.
    """

    def __init__(self, system: System, batch_tokens: int = BATCH_TOKENS) -> None:
        super().__init__()
        self.system, self.tokenizer, self._batch_tokens = system, system.tokenizer, batch_tokens
        self._through_cache = scored_through_cache(system)
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that starts it, if there is one."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.system.context

    @property
    def tokenizer_name(self) -> str:
        """Fingerprints lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's choice after its context, and whether greedy decoding would give it.

        All texts are tokenized at once, each different one once: one by one it would take longer than the model.
        """
        pairs = [request.args for request in requests]
        texts = {context.rstrip() for context, _ in pairs} | {context + choice for context, choice in pairs}
        listed = sorted(text for text in texts if not self._starts_itself(text))
        if listed:
            self._encoded = dict(zip(listed, self.tokenizer(listed, verbose=False)["input_ids"], strict=True))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._encoded.clear()
        return answers

    def _starts_itself(self, text: str) -> bool:
        """Whether a text brings its own start token."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as the tokenizer makes them; no second start token where the text brings its own."""
        if add_special_tokens is None and string in self._encoded:
            return self._encoded[string]
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self._starts_itself(string):
            options["add_special_tokens"] = False
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        single: dict[tuple[int, ...], list[int]] = {}
        longer: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, choice) in enumerate(requests):
            room = self.max_length + 1 - len(choice)
            context = context[-room:] if room > 0 else context[-1:]
            if len(choice) == 1:
                single.setdefault(tuple(context), []).append(number)
            else:
                longer.setdefault((*context, *choice[:-1]), []).append(number)
        single_numbers, longer_numbers = list(single.values()), list(longer.values())
        keeps = [max(len(requests[number][2]) for number in numbers) for numbers in longer_numbers]
        for place, row in self._rows(list(single), [1] * len(single)):
            numbers = single_numbers[place]
            log_probabilities = torch.log_softmax(row[-1].float(), -1)
            best = int(log_probabilities.argmax())
            picked = log_probabilities[[requests[number][2][0] for number in numbers]].tolist()
            for number, value in zip(numbers, picked, strict=True):
                answers[number] = (value, requests[number][2][0] == best)
        for place, row in self._rows(list(longer), keeps):
            for number in longer_numbers[place]:
                wanted = torch.tensor(requests[number][2], device=row.device)
                log_probabilities = torch.log_softmax(row[-len(wanted) :].float(), -1)
                value = float(log_probabilities.gather(-1, wanted[:, None]).sum())
                answers[number] = (value, bool((log_probabilities.argmax(-1) == wanted).all()))
        return answers

    def _rows(self, sequences: list[tuple[int, ...]], keeps: list[int]) -> Iterator[tuple[int, Tensor]]:
        """The place of each sequence and the logits (its `keep` or more, vocabulary) of its last tokens.

        Sequences of one length run together, so no padding ever enters a cache; they come as they are done.
        """
        by_length: dict[int, list[int]] = {}
        for place, sequence in enumerate(sequences):
            by_length.setdefault(len(sequence), []).append(place)
        for length, places in sorted(by_length.items(), reverse=True):
            count = max(1, self._batch_tokens // length)
            for start in range(0, len(places), count):
                batch = places[start : start + count]
                ids = torch.tensor([sequences[place] for place in batch])
                keep = max(keeps[place] for place in batch)
                logits = window_logits(self.system, ids, through_cache=self._through_cache, keep=keep)
                yield from zip(batch, logits, strict=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that give every token as much context as they can."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts continued through the system's own decoding policy."""
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            most = int(options.get("max_gen_toks", 256))
            ids = self.tok_encode(context)[-max(1, self.max_length - most) :]
            prompt = torch.tensor([ids], device=self.system.device)
            ends = [self.eot_token_id]
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            generation = self.system.generate(self.system, prompt, most, temperature=temperature, stop=ends)
            text = self.tokenizer.decode(generation.ids[0, len(ids) :], skip_special_tokens=True)
            for mark in [until] if isinstance(until, str) else until:
                text = text.split(mark)[0]
            texts.append(text)
        return texts


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's task manager; its own thousands of tasks are indexed only if one is asked for."""
    from lm_eval.tasks import TaskManager

    ours = TaskManager(include_path=str(REFERENCE), include_defaults=False)
    if set(names) <= set(ours.all_tasks):
        return ours
    return TaskManager(include_path=str(REFERENCE))


def task_names() -> list[str]:
    """The tasks that come with effbench, by file name."""
    return list(registry.tasks())


def check_tasks(names: Sequence[str]) -> None:
    """Raises `TaskError` for a task that neither effbench nor the installed lm-eval has."""
    if set(names) <= set(task_names()):
        return
    known = set(_manager(names).all_tasks)
    for name in names:
        if name not in known:
            raise TaskError(f"no task {name!r}{suggest(name, sorted(known))} (`effbench list tasks` shows ours)")


def evaluate(system: System, names: Sequence[str], limit: int | None = None) -> dict[str, TaskResult]:
    """Each task's items, scored zero-shot by lm-eval with its own prompts and metrics.

    Raises `TaskError` where a task's data cannot be had.
    """
    from lm_eval.evaluator import evaluate as run

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = _manager(names).load(list(names))
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=0)
            output = run(lm=SystemLM(system), task_dict=loaded, limit=limit, bootstrap_iters=0, verbosity="ERROR")
    except (ConnectionError, FileNotFoundError) as reason:
        raise TaskError(f"the data of {', '.join(names)} cannot be had without a network ({reason})") from None
    results = {}
    for name, samples in output["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        if "acc" not in samples[0]:
            raise TaskError(f"task {name!r} gives no accuracy (its metrics are others); leave it out of --tasks")
        correct = [int(sample["acc"]) for sample in samples]
        choices = loaded["tasks"][name].get_config("output_type") == "multiple_choice"
        chance = sum(1 / len(sample["resps"]) for sample in samples) / len(samples) if choices else None
        items = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()[:16]
        results[name] = TaskResult(correct, chance, items)
    return results
