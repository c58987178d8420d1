"""Our lm-eval model answers as lm-eval's own does."""

import random

import pytest
import torch
from conftest import random_system
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from effbench import models
from effbench.errors import TaskError
from effbench.measure.accuracy import SystemLM, check_tasks, evaluate, task_names
from effbench.reference.world import World


def requests(count: int) -> list[Instance]:
    """Questions with choices of one word and of several, some of which share their context."""
    rng, words = random.Random(0), World().vocabulary[10:]
    made = []
    for _ in range(count):
        context = " ".join(rng.choices(words, k=rng.randint(3, 40)))
        for length in (1, 1, 2, 4):
            made.append((context, " " + " ".join(rng.choices(words, k=length))))
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(made)]


def test_log_likelihoods_equal_those_of_lm_eval_s_own_model(architecture: str) -> None:
    system = random_system(architecture, torch.float32)
    asked = requests(8)
    theirs = HFLM(pretrained=system.model, tokenizer=system.tokenizer, batch_size=4, device="cpu", max_length=512)
    ours = SystemLM(system, batch_tokens=100)
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]


def test_rolling_log_likelihood_equals_that_of_lm_eval_s_own_model() -> None:
    system = random_system("llama", torch.float32)
    text = " ".join(World().vocabulary[10:900])
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    theirs = HFLM(pretrained=system.model, tokenizer=system.tokenizer, batch_size=1, device="cpu", max_length=512)
    assert SystemLM(system).loglikelihood_rolling(asked)[0] == pytest.approx(
        theirs.loglikelihood_rolling(asked)[0], rel=1e-5
    )


def test_generation_stops_at_a_mark() -> None:
    system = models.load("ref-70k", "float32")
    context = "the"
    free = SystemLM(system).generate_until([Instance("generate_until", {}, (context, {"max_gen_toks": 20}), 0)])[0]
    mark = free.split()[3]
    limits = {"max_gen_toks": 20, "until": [mark]}
    cut = SystemLM(system).generate_until([Instance("generate_until", {}, (context, limits), 0)])[0]
    assert mark not in cut.split() and free.startswith(cut.strip())


def test_reference_tasks_run_and_their_chance_comes_from_their_choices() -> None:
    system = models.load("ref-70k")
    found = evaluate(system, task_names(), limit=4)
    assert set(found) == set(task_names()) and len(found) >= 8
    for result in found.values():
        assert len(result.correct) == 4 and 0 < result.chance <= 0.5


def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    with pytest.raises(TaskError, match="did you mean 'ref_copying'"):
        check_tasks(["ref_copyin"])
