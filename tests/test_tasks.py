"""lm-eval's tasks by name: items from a folder, examples, chats, groups; scores are those of lm-eval's own model."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, random_model
from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from test_accuracy import byte_level

from effbench.errors import TaskError
from effbench.measure import tasks
from effbench.measure.accuracy import build, evaluate
from effbench.measure.questions import Questions, fingerprint
from effbench.measure.task_data import local
from effbench.measure.tasks import Asking, check_tasks, load_tasks, quiet, task_manager
from effbench.technique import System

ANSWERED: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {
            "context": "Question: What is hot?\nAnswer:",
            "choices": ["fire", "ice", "a long cold winter night"],
            "gold": 0,
        },
        {"context": "Question: What is wet?\nAnswer:", "choices": ["dust", "the sea"], "gold": 1},
    ],
    "openbookqa": [{"context": "a fish lives in", "choices": ["the sea", "a tree"], "gold": 0}],
    "piqa": [{"context": "Question: open a door\nAnswer:", "choices": ["push it", "paint it"], "gold": 0}],
    "boolq": [{"context": "Passage: It rains.\nQuestion: is it wet?", "choices": ["no", "yes"], "gold": 1}],
    "hellaswag": [
        {"context": "Diving: A man stands. He waits. the man", "choices": ["jumps.", "reads."], "gold": 0},
        {"context": "Home: How to paint. Buy some paint.", "choices": ["Stir it.", "Sell it."], "gold": 0},
    ],
    "winogrande": [
        {
            "context": "The cat saw the dog and the",
            "contexts": ["The cat saw the dog and the cat", "The cat saw the dog and the dog"],
            "continuation": "ran away.",
            "gold": 0,
            "choices": ["cat ran away.", "dog ran away."],
        }
    ],
}
ON_HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "arc_easy": (
        "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet",
        {
            "id": "x",
            "question": "What is hot?",
            "choices": {"text": ["fire", "ice", "a long cold winter night"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
    ),
    "openbookqa": (
        "datasets--allenai--openbookqa/snapshots/0abc/main/test-00000-of-00001.parquet",
        {
            "question_stem": "a fish lives in",
            "choices": {"text": ["the sea", "a tree"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ),
    "piqa": ("piqa/valid.jsonl", {"goal": "open a door", "sol1": "push it", "sol2": "paint it", "label": 0}),
    "boolq": ("super_glue/boolq/validation.jsonl", {"passage": "It rains.", "question": "is it wet", "label": 1}),
    "hellaswag": (
        "hellaswag/data/validation.json.gz",
        {
            "activity_label": "Diving",
            "ctx_a": "A man stands. He waits.",
            "ctx_b": "the man",
            "endings": ["jumps.", "reads."],
            "label": "0",
        },
    ),
    "winogrande": (
        "allenai/winogrande/winogrande_xl/validation-00000-of-00001.parquet",
        {
            "sentence": "The cat saw the dog and the _ ran away.",
            "option1": "cat",
            "option2": "dog",
            "answer": "1",
        },
    ),
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Items of six tasks in a file each, and of others as their makers give them."""
    for name, rows in ANSWERED.items():
        write(tmp_path / f"{name}.jsonl", rows)
    write(
        tmp_path / "wikitext.jsonl", [{"page": "The cat sat on the mat . \n The dog @-@ ran ."}, {"page": "A fish ."}]
    )
    return tmp_path


@pytest.fixture(scope="module")
def system() -> System:
    return System.dense(random_model("llama").float(), byte_level())


def prompts(folder: Path, name: str, count: int = 1) -> list[tuple[str, str]]:
    with quiet():
        task = load_tasks([name], Asking(data=str(folder)))["tasks"][name]
        task.build_all_requests(limit=count)
    return [request.args for request in task.instances]


@pytest.mark.parametrize("name", ON_HUB)
def test_an_item_of_context_and_choices_becomes_the_prompt_that_the_hub_s_item_becomes(
    name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hub = tmp_path_factory.mktemp("hub")
    file, row = ON_HUB[name]
    write(hub / file, [row])
    assert prompts(folder, name) == prompts(hub, name) and len(prompts(hub, name)) >= 2


def test_prompts_are_lm_eval_s() -> None:
    assert ON_HUB.keys() == ANSWERED.keys()
    data = SHARED / "mc"
    if not data.is_dir():
        pytest.skip("the real tasks are not beside this repository")
    for name, start in {
        "hellaswag": "Roof shingle removal: A man is sitting on a roof. He",
        "winogrande": "Sarah was a much better surgeon than Maria so Sarah",
        "arc_challenge": "Question: An astronomer observes that a planet rotates faster after a meteorite impact.",
    }.items():
        if name != "hellaswag":  # whose ten thousand items lm-eval goes over first
            assert prompts(data, name)[0][0].startswith(start)


def scored(system: System, names: list[str], asking: Asking, **options: Any) -> tuple[Any, Any]:
    """What we make of some tasks, and lm-eval with its own model."""
    ours = evaluate(system, names, asking=asking)
    theirs = HFLM(pretrained=system.model, tokenizer=system.tokenizer, batch_size=2, device="cpu", max_length=512)
    with quiet(), local(Path(asking.data or "")):
        manager = task_manager(names)
        found = simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    return ours, found


def test_accuracy_by_log_likelihood_and_by_the_character_is_that_of_lm_eval_item_by_item(
    folder: Path, system: System, tmp_path: Path
) -> None:
    names, asking = list(ANSWERED), Asking(data=str(folder))
    ours, theirs = scored(system, names, asking)
    differ = False
    for name in names:
        samples = theirs["samples"][name]
        assert ours[name].correct == [sample["acc"] for sample in samples]
        normed = [sample.get("acc_norm") for sample in samples]
        assert (ours[name].correct_norm or [None] * len(samples)) == normed
        differ = differ or ours[name].correct != ours[name].correct_norm is not None
    assert differ and ours["winogrande"].correct_norm is None
    asked = build(system, names, asking=asking)
    asked.save(tmp_path / "asked.npz")
    again = evaluate(system, names, asked=Questions.load(tmp_path / "asked.npz"))
    apart = Questions.joined([build(system, [name], asking=asking) for name in names])
    assert again == ours == evaluate(system, names, asked=apart)


def test_examples_come_before_an_item_as_lm_eval_draws_them(folder: Path, system: System) -> None:
    hub = folder / "piqa"
    (folder / "piqa.jsonl").unlink()
    goals = ["open", "close", "paint", "sell", "clean", "find"]
    rows = [{"goal": f"{goal} it", "sol1": "push", "sol2": f"take {goal}", "label": 1} for goal in goals]
    write(hub / "train.jsonl", rows)
    write(hub / "valid.jsonl", rows[:3])
    asking = Asking(num_fewshot=2, data=str(folder))
    ours, theirs = scored(system, ["piqa"], asking, num_fewshot=2)
    assert theirs["samples"]["piqa"][0]["arguments"][0][0].count("Question:") == 3
    context = build(system, ["piqa"], asking=asking).choices.contexts[0]
    assert system.tokenizer.decode(context) == theirs["samples"]["piqa"][0]["arguments"][0][0]
    assert ours["piqa"].correct == [sample["acc"] for sample in theirs["samples"]["piqa"]]
    with pytest.raises(TaskError, match="asked with 9 examples, and there are 6"):
        check_tasks(["piqa"], Asking(num_fewshot=9, data=str(folder)))
    with pytest.raises(TaskError, match="asked with 1 examples, and there are 0"):
        check_tasks(["boolq"], Asking(num_fewshot=1, data=str(folder)))


def test_items_are_turns_of_a_chat_if_asked_so(folder: Path, system: System) -> None:
    asking = Asking(chat_template=True, data=str(folder))
    with pytest.raises(TaskError, match="no chat template"):
        build(system, ["boolq"], asking=asking)
    talking = System.dense(system.model, byte_level())
    talking.tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ours, theirs = scored(talking, ["boolq"], asking, apply_chat_template=True)
    context = build(talking, ["boolq"], asking=asking).choices.contexts[0]
    said = theirs["samples"]["boolq"][0]["arguments"][0][0]
    assert said.startswith("<user>It rains.") and said.endswith("<assistant>")
    assert talking.tokenizer.decode(context) == said
    assert ours["boolq"].correct == [sample["acc"] for sample in theirs["samples"]["boolq"]]


def test_a_text_s_likelihood_is_told_by_the_word_and_by_the_byte(folder: Path, system: System) -> None:
    ours, theirs = scored(system, ["wikitext"], Asking(data=str(folder)))
    assert ours["wikitext"].correct is None and ours["wikitext"].accuracy is None
    for name in ("word_perplexity", "bits_per_byte"):
        assert ours["wikitext"].metrics[name] == pytest.approx(theirs["results"]["wikitext"][f"{name},none"], rel=1e-4)


def test_a_tag_stands_for_its_tasks(folder: Path, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    arc = tasks._root() / "arc"
    monkeypatch.setattr(tasks, "_root", lambda: arc)  # to index all that lm-eval has takes seconds
    write(folder / "arc_challenge.jsonl", ANSWERED["arc_easy"])
    found = evaluate(system, ["ai2_arc"], asking=Asking(data=str(folder)))
    assert list(found) == ["arc_challenge", "arc_easy"]
    parts = [build(system, [name], asking=Asking(data=str(folder))) for name in ("ai2_arc", "arc_easy")]
    with pytest.raises(TaskError, match="'arc_easy' was asked for twice"):
        Questions.joined(parts)


def test_only_what_is_called_like_a_task_is_indexed() -> None:
    tasks._indexed.cache_clear()
    manager = task_manager(["boolq", "ref_copying", "wikitext"])
    assert {"boolq", "ref_copying", "wikitext"} <= set(manager.all_tasks) and len(manager.all_tasks) < 100


def test_wrong_items_are_one_sentence(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    asking = Asking(data=str(folder))
    with pytest.raises(TaskError, match="has no test items of task 'arc_challenge'; looked for arc_challenge.jsonl"):
        check_tasks(["arc_challenge"], asking)
    (folder / "boolq.jsonl").write_text('{"context": "It rains", "choices": ["no", "yes"], "gold": 1}\n')
    with pytest.raises(TaskError, match="boolq.jsonl, item 1 is no item of task 'boolq'"):
        check_tasks(["boolq"], asking)
    (folder / "boolq.jsonl").write_text("{")
    with pytest.raises(TaskError, match="boolq.jsonl cannot be read as items of task 'boolq'"):
        check_tasks(["boolq"], asking)
    write(folder / "sciq.jsonl", ANSWERED["arc_easy"])
    with pytest.raises(TaskError, match="understood for arc_easy"):
        check_tasks(["sciq"], asking)
    with pytest.raises(TaskError, match="is not a folder"):
        check_tasks(["boolq"], Asking(data=str(folder / "boolq.jsonl")))
    with pytest.raises(TaskError, match="without a network"):
        load_tasks(["boolq"])


def test_questions_are_told_apart_by_how_they_are_asked(folder: Path, system: System) -> None:
    told = {
        fingerprint(system.tokenizer, "boolq", limit, asking)
        for limit in (None, 3)
        for asking in (Asking(), Asking(num_fewshot=2), Asking(chat_template=True), Asking(data=str(folder)))
    }
    (folder / "boolq.jsonl").write_text(json.dumps(ANSWERED["boolq"][0] | {"gold": 0}))
    told.add(fingerprint(system.tokenizer, "boolq", 3, Asking(data=str(folder))))
    assert len(told) == 9
