"""Our lm-eval model answers as lm-eval's own does."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_system
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from effbench import models
from effbench.errors import TaskError
from effbench.measure import questions
from effbench.measure.accuracy import SystemLM, build, evaluate
from effbench.measure.questions import Questions
from effbench.measure.tasks import check_tasks, load_tasks, task_names
from effbench.reference.tokenizer import build_tokenizer
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
    theirs = HFLM(
        pretrained=system.model, tokenizer=system.tokenizer, batch_size=1, device="cpu", max_length=system.context
    )
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


def test_questions_built_once_give_what_lm_eval_gives_with_its_own_model_item_by_item(tmp_path: Path) -> None:
    names, limit = ["ref_copying", "ref_facts_rare", "ref_agreement"], 12
    system = models.load("ref-70k", "float32")
    build(system, names, limit).save(tmp_path / "questions.npz")
    asked = Questions.load(tmp_path / "questions.npz")
    values, greedy = SystemLM(system).answer(asked.choices)
    results = asked.results(values)
    theirs = HFLM(pretrained=system.model, tokenizer=system.tokenizer, batch_size=4, device="cpu", max_length=512)
    samples = run_lm_eval(lm=theirs, task_dict=load_tasks(names), limit=limit, bootstrap_iters=0)["samples"]
    answers = [answer for name in asked.order for sample in samples[name] for answer in sample["filtered_resps"]]
    assert not asked.others and len(answers) == len(values) > 3 * limit
    for value, best, other in zip(values.tolist(), greedy.tolist(), answers, strict=True):
        assert value == pytest.approx(other[0], abs=1e-4) and best == other[1]
    for name in names:
        assert results[name].correct == [sample["acc"] for sample in samples[name]]
    assert 0 < sum(results["ref_agreement"].correct) < limit


def test_tasks_that_are_no_plain_multiple_choice_are_scored_by_lm_eval_and_both_ways_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, system = ["ref_tracking", "ref_copying", "ref_facts_asked"], models.load("ref-70k")
    shared = evaluate(system, names, limit=20)
    plain = questions._is_plain
    monkeypatch.setattr(questions, "_is_plain", lambda task: task.config.task == "ref_copying" and plain(task))
    assert build(system, names, limit=20).others == ("ref_tracking", "ref_facts_asked")
    mixed = evaluate(system, names, limit=20)
    assert mixed == shared and list(mixed) == names


def test_a_task_whose_results_are_not_the_likeliest_choice_is_not_taken_for_one() -> None:
    def task(**changes: Any) -> SimpleNamespace:
        usual = {
            "multiple_input": 0,
            "doc_to_target": lambda doc: 1,
            "process_results": lambda doc, answers: {"acc": float(answers[1][0] == 0.0)},
        }
        return SimpleNamespace(**(usual | changes))

    item = [Instance("loglikelihood", {}, ("a", f" {place}"), place) for place in range(3)]
    assert questions._right(task(), item) == [False, True, False]
    assert questions._right(task(doc_to_target=lambda doc: [0, 2]), item) is None
    assert questions._right(task(process_results=lambda doc, answers: {"acc": 1.0}), item) is None


def byte_level() -> PreTrainedTokenizerFast:
    """A small tokenizer that joins bytes and knows nothing of words."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(World().vocabulary, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokenizer.id_to_token(0))


@pytest.mark.parametrize("tokenizer", [build_tokenizer(World().vocabulary), byte_level()], ids=["words", "bytes"])
def test_token_ids_are_those_that_lm_eval_makes_pair_by_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    one, two, three = World().vocabulary[20:23]
    contexts = ["", f"{one} {two}", f"{one} ", f" {two}  ", f"{one}\n", f"{tokenizer.bos_token or ''}{one} {two}"]
    pairs = [
        (context, choice) for context in contexts for choice in (f" {three}", f" {one} {three}", three, f"\t{two}")
    ]
    lm = SystemLM(models.load("ref-70k"))
    lm.tokenizer = tokenizer
    lm._start = tokenizer.bos_token or ""
    expected = TemplateLM.loglikelihood(lm, [Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    found = lm.encode([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for number, (start, length) in enumerate(zip(found.starts, found.lengths, strict=True)):
        context, choice = expected[number]
        assert found.contexts[found.context_of[number]].tolist() == context, pairs[number]
        assert found.tokens[start : start + length].tolist() == choice, pairs[number]


def test_a_choice_that_a_token_of_its_context_swallows_has_the_tokens_from_there_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with vocabularies whose tokens hold several words, where lm-eval's own model stops."""
    lm = SystemLM(models.load("ref-70k", "float32"))
    ids = {"a b": [5, 6, 7], "a b c": [5, 8, 9], "a b d": [5, 6, 7, 4], "x": [9], "x y": [8]}
    monkeypatch.setattr(lm, "_tokenized", lambda texts, **_: {text: ids[text] for text in texts})
    monkeypatch.setattr("effbench.measure.encoding._splits_at_spaces", lambda _: False)
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in (("a b", " c"), ("a b", " d"), ("x", " y"))]
    found = lm.encode(asked)
    assert [found.contexts[place].tolist() for place in found.context_of] == [[5], [5, 6, 7], [lm.prefix_token_id]]
    assert (found.tokens.tolist(), found.lengths.tolist()) == ([8, 9, 4, 8], [2, 1, 1])
    values, _ = lm.answer(found)
    assert (values < 0).all()
