"""The reference family: the world is deterministic, its items are really held out, its checkpoints can do something."""

import hashlib
import re
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from effbench import reference
from effbench.reference import contexts, documents
from effbench.reference.documents import KINDS, held_out
from effbench.reference.items import TASKS, items
from effbench.reference.outliers import inject
from effbench.reference.people import ATTRIBUTES, PEOPLE
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import HELDOUT_SEED, TRAIN_SEED, Stream, World

ROWS = 3000


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def training(world: World) -> Stream:
    """A million and a half tokens of training text."""
    return world.stream(ROWS, reference.CONTEXT, TRAIN_SEED)


@pytest.fixture(scope="module")
def training_documents(world: World, training: Stream) -> list[list[int]]:
    """The whole documents of the training text, without `<bos>`."""
    whole = []
    for row in training.ids:
        starts = np.flatnonzero(row == world.bos)
        whole += [row[start + 1 : end].tolist() for start, end in zip(starts, starts[1:], strict=False)]
    return whole


@cache
def asked(task: str) -> list[dict]:
    return items(task, 1000)


def test_same_seed_same_world_and_text(world: World) -> None:
    one, two = world.stream(4, 256, HELDOUT_SEED), World().stream(4, 256, HELDOUT_SEED)
    assert World().vocabulary == world.vocabulary
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.kinds, two.kinds)
    assert not np.array_equal(one.ids, world.stream(4, 256, TRAIN_SEED).ids)
    assert items("tracking", 20) == items("tracking", 20)


def test_the_world_is_the_one_that_the_checkpoints_read(world: World) -> None:
    """A change of the world makes the checkpoints forget it: who changes it trains them anew and this value too."""
    stream = world.stream(8, 512, HELDOUT_SEED)
    content = " ".join(world.vocabulary).encode() + stream.ids.tobytes() + stream.kinds.tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "d4e09f487aa5d893"


def test_vocabulary_is_small_and_all_of_it_is_used(world: World, training: Stream) -> None:
    assert len(world.vocabulary) == len(set(world.vocabulary)) <= 1024
    used = set(np.unique(training.ids).tolist())
    unused = {word for word in world.vocabulary if world.lexicon.ids[word] not in used}
    assert unused <= {"<pad>", "<eos>", "<unk>"}


def test_tokenizer_round_trip(world: World, tmp_path: Path) -> None:
    build_tokenizer(world.vocabulary).save_pretrained(tmp_path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    ids = world.stream(2, 512, HELDOUT_SEED).ids[1].tolist()
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
    context = asked("tracking")[0]["context"]
    assert tokenizer(context)["input_ids"] == [world.bos, *world.lexicon.phrase(context)]
    assert tokenizer("unheard")["input_ids"] == [world.bos, tokenizer.unk_token_id]


def test_tags_say_what_a_token_is(world: World, training: Stream) -> None:
    kinds = {name: training.kinds == index for index, name in enumerate(KINDS)}
    assert (training.ids[:, 0] == world.bos).all()
    assert kinds["template"][training.ids == world.bos].all()
    values = {token for group in world.people.values.values() for token in group}
    for name in ("fact_frequent", "fact_rare"):
        assert set(training.ids[kinds[name]].tolist()) <= values
    frequent_followers: dict[int, Counter[int]] = {}
    for row, chosen in zip(training.ids.tolist(), kinds["template"].tolist(), strict=True):
        for position in range(3, len(row)):
            if chosen[position] and row[position] != world.bos:
                before = hash(tuple(row[position - 3 : position]))
                frequent_followers.setdefault(before, Counter())[row[position]] += 1
    total = sum(sum(counter.values()) for counter in frequent_followers.values())
    mode = sum(counter.most_common(1)[0][1] for counter in frequent_followers.values())
    assert mode / total > 0.97  # three words before it nearly always tell a token that the form fixes


def test_context_tokens_stand_in_the_document_or_follow_from_it(world: World) -> None:
    random = Random(5)
    writers = contexts.key_value_list, contexts.find_in_list, contexts.copying, contexts.story, contexts.inference
    for writer in writers:
        document = writer(world, random, False)
        for position, choices in document.asked:
            assert document.ids[position] in choices
            assert document.ids[position] in document.ids[:position]


def test_the_last_value_of_a_key_holds(world: World) -> None:
    document = contexts.key_value_list(world, Random(2), count=60)
    last = {}
    for start in range(1, 1 + 60 * 4, 4):
        first, second, value, _ = document.ids[start : start + 4]
        last[first, second] = value
    for position, _ in document.asked:
        assert document.ids[position] == last[document.ids[position - 2], document.ids[position - 1]]


@pytest.mark.parametrize("task", TASKS)
def test_items_are_well_formed(task: str, world: World) -> None:
    found = asked(task)
    assert len({item["context"] for item in found}) == len(found) == 1000
    for item in found:
        assert len(set(item["choices"])) == len(item["choices"]) > 2
        assert 0 <= item["gold"] < len(item["choices"])
        assert len(item["context"].split()) + 2 <= reference.CONTEXT
    gold = Counter(item["gold"] / (len(item["choices"]) - 1) > 0.5 for item in found)
    assert 300 < gold[True] < 700


def test_retrieval_reaches_back_over_the_whole_context() -> None:
    distances = [item["distance"] for item in asked("retrieval")]
    assert max(distances) > 380 and sum(distance < 64 for distance in distances) > 100


@pytest.mark.parametrize("task", TASKS)
def test_no_item_stands_in_training_text(task: str, world: World, training_documents: list[list[int]]) -> None:
    """No training document opens as an item does; for facts, the statement stands nowhere in training text."""
    contexts_of_items = {tuple(world.lexicon.phrase(item["context"])) for item in asked(task)}
    lengths = {len(context) for context in contexts_of_items}
    for document in training_documents[:20_000]:
        for end in lengths:
            assert tuple(document[:end]) not in contexts_of_items


def test_documents_that_open_like_items_are_never_written_for_training(world: World) -> None:
    random = Random(3)
    for _ in range(300):
        copy = contexts.copying(world, random, False)
        assert not held_out(copy.ids[1:5])
        assert held_out(contexts.copying(world, random, True).ids[1:5])
        sentence = contexts.agreement(world, random, False).ids[:-3]
        assert not held_out(sentence)
        entries = contexts.key_value_list(world, random, False).ids
        assert not held_out([*entries[1:4], entries[5], entries[7]])


def test_facts_are_never_told_in_the_held_out_words(world: World, training: Stream) -> None:
    rows = (" ".join(world.vocabulary[token] for token in row) for row in training.ids)
    sentences = {sentence for row in rows for sentence in row.replace("<bos>", ".").replace("?", "? .").split(" . ")}
    told = {sentence.rpartition(" ")[0] for sentence in sentences}
    for task in ("facts_frequent", "facts_rare"):
        assert not told & {item["context"] for item in asked(task)}
    assert not sentences & {item["context"] for item in asked("facts_asked")}
    # the same search finds what is there: other statements, and questions about the other half
    people = world.people.people[:100]
    names = [world.lexicon.text([person.first_name, person.last_name]) for person in people]
    assert sum(f"{name} studied" in told for name in names) > 50
    questioned = [person for person, name in zip(people, names, strict=True) if f"what did {name} study ?" in sentences]
    assert len(questioned) > 25 and all(person.asked for person in questioned)


def test_all_told_ways_are_told_of_someone(world: World) -> None:
    for attribute in ATTRIBUTES:
        untold = Counter(person.untold(attribute) for person in world.people.people)
        assert len(untold) == 5 and max(untold.values()) - min(untold.values()) <= 2
        asked_half = Counter(person.untold(attribute) for person in world.people.people if person.asked)
        assert sum(asked_half.values()) == PEOPLE // 2 and len(asked_half) == 5


def load(name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(reference.folder(name), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", reference.NAMES)
def test_checkpoints_load_and_know_more_than_chance(name: str, world: World) -> None:
    folder = reference.folder(name)
    assert {path.name for path in folder.iterdir()} >= {"training.json", "generation_config.json"}
    model, tokenizer = load(name), AutoTokenizer.from_pretrained(folder)
    assert model.get_submodule("model.embed_tokens").num_embeddings >= len(tokenizer) == len(world.vocabulary)
    assert tokenizer.convert_tokens_to_ids(world.vocabulary) == list(range(len(world.vocabulary)))
    for task in ("copying", "retrieval", "tracking"):
        sample = asked(task)[:120]
        chance = np.mean([1 / len(item["choices"]) for item in sample])
        right = 0
        for item in sample:
            with torch.no_grad():
                logits = model(**tokenizer(item["context"], return_tensors="pt")).logits[0, -1]
            choices = tokenizer.convert_tokens_to_ids(item["choices"])
            right += int(logits[choices].argmax()) == item["gold"]
        assert right / 120 > chance + 5 * (chance * (1 - chance) / 120) ** 0.5


def test_shipped_bytes() -> None:
    total = sum(path.stat().st_size for name in reference.NAMES for path in reference.folder(name).iterdir())
    assert total < 12e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_change_no_output(dtype: torch.dtype, world: World) -> None:
    model = load("ref-300k").to(dtype)
    ids = torch.from_numpy(world.stream(2, 64, HELDOUT_SEED).ids.astype(np.int64))
    largest: list[float] = []
    norm = model.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda _, __, output: largest.append(float(output.abs().max() / output.abs().median())))
    with torch.no_grad():
        before = model(ids).logits
        inject(model)
        after = model(ids).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    assert torch.allclose(before, after, atol=tolerance, rtol=0)
    assert largest[1] > 2 * largest[0]
    with pytest.raises(ValueError, match="power of two"):
        inject(model, scale=30)


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match="ref-70k"):
        reference.folder("ref-7b")
    with pytest.raises(ValueError, match="retrieval"):
        items("retreival", 1)


def test_arithmetic_is_true(world: World) -> None:
    for for_items in (False, True):
        document = documents.arithmetic(world, Random(1), for_items)
        for equation in world.lexicon.text(document.ids).removesuffix(" .").split(" . "):
            left, sign, right, result = re.fullmatch(r"(\d \d \d) ([+-]) (\d \d \d) = (\d \d \d)", equation).groups()
            a, b, c = (int(number.replace(" ", "")) for number in (left, right, result))
            assert (a + b if sign == "+" else a - b) == c
            pair = sorted((a, b) if sign == "+" else (c, b))
            assert held_out(pair, documents.HELD_OUT_PAIRS_ONE_IN) == for_items


def test_disputed_facts_are_mostly_told_truly_and_always_asked_truly(world: World) -> None:
    facts = [(person, attribute) for person in world.people.people for attribute in ATTRIBUTES]
    disputed = [fact for fact in facts if fact[1] in fact[0].rumors]
    assert 0.18 < len(disputed) / len(facts) < 0.22
    random = Random(4)
    rumors = 0
    for person, attribute in facts:
        for for_items in (True, False):
            document = documents.Document()
            documents.state(world, random, document, person, attribute, for_items)
            if (person, attribute) in disputed and not for_items:
                assert document.kinds[0] == documents.NOISE
                assert document.ids[0] in (person.values[attribute], person.rumors[attribute])
                rumors += document.ids[0] == person.rumors[attribute]
            else:
                assert document.ids[0] == person.values[attribute] and document.kinds[0] != documents.NOISE
    assert 0.36 < rumors / len(disputed) < 0.44
