"""Accuracy through lm-eval, whose requests are answered by a `System`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from effbench.errors import TaskError
from effbench.measure import questions
from effbench.measure.answers import Answers
from effbench.measure.encoding import Choices, Encoder
from effbench.measure.likelihood import Likelihoods
from effbench.measure.questions import Questions, TaskResult
from effbench.measure.tasks import PLAINLY, Asking, load_tasks, quiet
from effbench.technique import System

FIGURES = ("word_perplexity", "bits_per_byte")
"""What lm-eval says of a whole task and has a column here."""


class SystemLM(Encoder):
    """Lets lm-eval score a `System`.

    What choices share is run once (see `effbench.measure.likelihood`). Systems with a cache policy of their own are
    scored through their cache. What is in `known`, if given, is not run again.
    """

    def __init__(self, system: System, batch_tokens: int | None = None, known: Answers | None = None) -> None:
        super().__init__(system.tokenizer)
        self.system, self.known = system, known
        self._likelihoods = Likelihoods(system, batch_tokens)

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.system.context

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's choice after its context, and whether greedy decoding would give it."""
        values, greedy = self.answer(self.encode(requests))
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def answer(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihood (choices,) of each choice after its context, and whether greedy decoding would give it."""
        answer = self._likelihoods.answer
        return self.known.complete(choices, answer) if self.known else answer(choices)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that give every token as much context as they can."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        values, _ = self.answer(Choices.of([window for text in windows for window in text]))
        ends = np.cumsum([len(text) for text in windows])
        return [float(values[end - len(text) : end].sum()) for text, end in zip(windows, ends, strict=True)]

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


def build(system: System, names: Sequence[str], limit: int | None = None, asking: Asking = PLAINLY) -> Questions:
    """The first `limit` items of each task for systems with this one's tokenizer.

    Raises `TaskError` where a task's items cannot be had.
    """
    with quiet():
        return questions.build(SystemLM(system), names, limit, asking)


def evaluate(
    system: System,
    names: Sequence[str],
    limit: int | None = None,
    asked: Questions | None = None,
    asking: Asking = PLAINLY,
    known: Answers | None = None,
) -> dict[str, TaskResult]:
    """Each task's items, scored with lm-eval's own prompts and metrics; a group's tasks one by one.

    `asked` are the same tasks' questions if they are built already, `known` what this system answered before. Raises
    `TaskError` where a task's items cannot be had or none of its metrics has a column here.
    """
    asked = asked or build(system, names, limit, asking)
    lm = SystemLM(system, known=known)
    values, _ = lm.answer(asked.choices)
    results = asked.results(values)
    if asked.others:
        with quiet():
            results |= _by_lm_eval(lm, names, asked.others, limit, asking)
    return {name: results[name] for name in asked.order}


def _by_lm_eval(
    lm: SystemLM, names: Sequence[str], others: Sequence[str], limit: int | None, asking: Asking
) -> dict[str, TaskResult]:
    """The same from requests to metrics by lm-eval itself, of some of the tasks that `names` stand for."""
    from lm_eval.evaluator import evaluate as run

    loaded = load_tasks(names, asking)
    tasks = {name: loaded["tasks"][name] for name in others}
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True} if asking.chat_template else {}
    output = run(
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,
        verbosity="ERROR",
        **chat,
    )
    return {name: _result(name, task, output) for name, task in tasks.items()}


def _result(name: str, task: Any, output: dict[str, Any]) -> TaskResult:
    """What lm-eval says about one task, if it has a column here."""
    samples = output["samples"][name]
    first = samples[0]["filter"]  # a task may look at one answer in several ways; its first is the one it is known by
    samples = sorted((one for one in samples if one["filter"] == first), key=lambda sample: sample["doc_id"])
    items = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()[:16]
    marks = {
        metric: [int(sample[metric]) for sample in samples]
        for metric in ("acc", "exact_match", "acc_norm")
        if all(sample.get(metric) in (0, 1) for sample in samples)
    }
    correct = marks.get("acc", marks.get("exact_match"))
    figures = output["results"][name]
    metrics = {metric: figures.get(f"{metric},{first}") for metric in FIGURES}
    metrics = {metric: float(value) for metric, value in metrics.items() if isinstance(value, int | float)}
    if correct is None and not metrics:
        raise TaskError(
            f"task {name!r} says neither what is right nor how likely a text is (its metrics are "
            f"{', '.join(task.aggregation())}); leave it out of --tasks"
        )
    choices = task.get_config("output_type") == "multiple_choice"
    chance = sum(1 / len(sample["resps"]) for sample in samples) / len(samples) if choices else None
    return TaskResult(correct, chance, items, marks.get("acc_norm"), metrics)
