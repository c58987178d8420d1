"""Zero-shot questions about the synthetic world, none of which stands in training text.

    items("retrieval", 1000) -> [{"context": "list surk mux , ...", "choices": ["mux", ...], "gold": 3, ...}, ...]

Facts about people must have been read in training, that is what these tasks ask for; what was never read is the form:
`facts_frequent` and `facts_rare` tell the fact in the one statement (of five) with which training text never tells this
attribute of this person, and `facts_asked` asks a question about a person of the half about whom training text never
asks. All other items are documents whose opening choices are held out (`documents.held_out`), so that no training
document begins as their contexts do; for arithmetic the pair of numbers is held out.

Choices are all values that could stand there: every town for a birthplace, every value in the list, every room in the
story. An item's chance level is one over their number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from effbench.reference import contexts, documents
from effbench.reference.documents import Document
from effbench.reference.people import ATTRIBUTES, FREQUENT, PEOPLE
from effbench.reference.world import ITEM_SEED, World

Item = dict[str, Any]

LIST_LENGTHS = (16, 32, 64, 102)
"""Entries in the lists that retrieval is asked over; the longest fill four fifths of the context."""

COPY_LENGTHS = (20, 80)
"""Fewest and most words in the sequences that are copied."""


@cache
def _world() -> World:
    return World()


def _untold_fact(world: World, random: Random, first_rank: int, end_rank: int) -> Document:
    person = world.people.people[random.randrange(first_rank, end_rank)]
    attribute = random.choice(ATTRIBUTES)
    document = Document()
    name = [person.first_name, person.last_name]
    documents.tell(world, document, attribute, person.untold(attribute), name)
    documents.state(world, random, document, person, attribute, True)
    return document


def facts_frequent(world: World, random: Random) -> Document:
    """A fact about a frequent person, told in words in which training text never tells it."""
    return _untold_fact(world, random, 0, FREQUENT)


def facts_rare(world: World, random: Random) -> Document:
    """A fact about a rare person, told in words in which training text never tells it."""
    return _untold_fact(world, random, FREQUENT, PEOPLE)


def facts_asked(world: World, random: Random) -> Document:
    """A question about one of the more frequent people, about whom training text tells everything but asks nothing."""
    person = world.people.people[random.randrange(FREQUENT) * 2 + 1]
    attribute = random.choice(ATTRIBUTES)
    document = Document()
    documents.question(world, document, person, attribute)
    documents.state(world, random, document, person, attribute, True)
    return document


def tracking(world: World, random: Random) -> Document:
    """Where a person or a thing is, after up to ten events."""
    return contexts.story(world, random, True)


def agreement(world: World, random: Random) -> Document:
    """The verb of a sentence with four to nine distractors; one of six verbs has the right tense and number."""
    return contexts.agreement(world, random, True)


def retrieval(world: World, random: Random) -> Document:
    """The value of one key in a list, asked at any depth."""
    return contexts.key_value_list(world, random, True, count=random.choice(LIST_LENGTHS))


def copying(world: World, random: Random) -> Document:
    """The next word in the copy of a sequence in which words come up again and again."""
    return contexts.copying(world, random, True, length=random.randint(*COPY_LENGTHS))


def arithmetic(world: World, random: Random) -> Document:
    """The first or second digit, which take a carry, of the sum or the difference of a held-out pair of numbers."""
    return documents.arithmetic(world, random, True)


def inference(world: World, random: Random) -> Document:
    """A person's color, which follows from two or three premises among those about others."""
    return contexts.inference(world, random, True)


TASKS: dict[str, Callable[[World, Random], Document]] = {
    writer.__name__: writer
    for writer in (
        facts_frequent, facts_rare, facts_asked, tracking, agreement, retrieval, copying, arithmetic, inference,
    )
}  # fmt: skip
"""The zero-shot tasks by name."""


def items(task: str, n: int, seed: int = ITEM_SEED, world: World | None = None) -> list[Item]:
    """`n` different items of a task: `context`, `choices`, the index `gold`, and `distance`.

    `distance` counts the tokens back to where the answer last stood in the context, 0 where it does not stand there.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    world = world or _world()
    random = Random(f"{task} {seed}")
    found: dict[str, Item] = {}
    for _ in range(100 * n):
        item = _item(world, random, TASKS[task](world, random))
        found.setdefault(item["context"], item)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"there are not {n} different items of the task {task!r}")


def _item(world: World, random: Random, document: Document) -> Item:
    """One asked place of the document, not among the first quarter of those, as an item."""
    first = len(document.asked) // 4
    position, choices = document.asked[random.randrange(first, len(document.asked))]
    context, gold = document.ids[:position], document.ids[position]
    choices = sorted(set(choices))
    distance = next((back for back, token in enumerate(reversed(context), 1) if token == gold), 0)
    return {
        "context": world.lexicon.text(context),
        "choices": [world.vocabulary[token] for token in choices],
        "gold": choices.index(gold),
        "distance": distance,
    }
