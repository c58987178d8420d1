"""Zero-shot accuracy through lm-eval, whose requests are answered by a `System`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from effbench import registry
from effbench.errors import TaskError
from effbench.measure import questions
from effbench.measure.encoding import Choices, Encoder
from effbench.measure.likelihood import Likelihoods
from effbench.measure.questions import Questions, TaskResult, load_tasks, task_manager
from effbench.registry import suggest
from effbench.technique import System


class SystemLM(Encoder):
    """Lets lm-eval score a `System`.

    What choices share is run once (see `effbench.measure.likelihood`). Systems with a cache policy of their own are
    scored through their cache.
    """

    def __init__(self, system: System, batch_tokens: int | None = None) -> None:
        super().__init__(system.tokenizer)
        self.system = system
        self._likelihoods = Likelihoods(system, batch_tokens)

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.system.context

    @property
    def tokenizer_name(self) -> str:
        """Fingerprints lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's choice after its context, and whether greedy decoding would give it."""
        values, greedy = self.answer(self.encode(requests))
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def answer(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihood (choices,) of each choice after its context, and whether greedy decoding would give it."""
        return self._likelihoods.answer(choices)

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


def task_names() -> list[str]:
    """The tasks that come with effbench, by file name."""
    return list(registry.tasks())


def check_tasks(names: Sequence[str]) -> None:
    """Raises `TaskError` for a task that neither effbench nor the installed lm-eval has."""
    if set(names) <= set(task_names()):
        return
    known = set(task_manager(names).all_tasks)
    for name in names:
        if name not in known:
            raise TaskError(f"no task {name!r}{suggest(name, sorted(known))} (`effbench list tasks` shows ours)")


def build(system: System, names: Sequence[str], limit: int | None = None) -> Questions:
    """The first `limit` items of each task for systems with this one's tokenizer.

    Raises `TaskError` where a task's data cannot be had.
    """
    with _quiet():
        return questions.build(SystemLM(system), names, limit)


def evaluate(
    system: System, names: Sequence[str], limit: int | None = None, asked: Questions | None = None
) -> dict[str, TaskResult]:
    """Each task's items, scored zero-shot with lm-eval's own prompts and metrics.

    `asked` are the same tasks' questions if they are built already. Raises `TaskError` where a task's data cannot be
    had or it gives no accuracy.
    """
    asked = asked or build(system, names, limit)
    values, _ = SystemLM(system).answer(asked.choices)
    results = asked.results(values)
    if asked.others:
        with _quiet():
            results |= _by_lm_eval(system, asked.others, limit)
    return {name: results[name] for name in asked.order}


def _by_lm_eval(system: System, names: Sequence[str], limit: int | None) -> dict[str, TaskResult]:
    """The same from requests to metrics by lm-eval itself."""
    from lm_eval.evaluator import evaluate as run

    loaded = load_tasks(names)
    output = run(lm=SystemLM(system), task_dict=loaded, limit=limit, bootstrap_iters=0, verbosity="ERROR")
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress and remarks."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        yield
