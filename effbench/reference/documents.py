"""The kinds of document that the world's text is made of, each written token by token with a tag for every token.

A document also marks its *asked* places: tokens that the text before them determines, with the values that could stand
there. Training text and zero-shot items come from the same writers; what keeps them apart is `held_out`: a document
whose opening choices hash to zero is written for items only and never for training text.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from effbench.reference.people import ATTRIBUTES, QUESTIONS, RUMOR_CHANCE, STATEMENTS, Person

if TYPE_CHECKING:
    from effbench.reference.world import World

KINDS = ("template", "noise", "fact_frequent", "fact_rare", "context")
"""What sort of token it is: fixed by the form of the document; a choice that nothing settles (a disputed fact is one);
a value that must be remembered from training, of a frequent or of a rare person; determined by the context."""

TEMPLATE, NOISE, FACT_FREQUENT, FACT_RARE, CONTEXT_TOKEN = range(len(KINDS))

HELD_OUT_ONE_IN = 8

DIGITS, HELD_OUT_PAIRS_ONE_IN = 3, 3
"""Equations are over numbers with so many digits; one pair of numbers in three is held out."""

EQUATIONS = 4
"""Equations in one document of training text."""


def held_out(choices: Sequence[int], one_in: int = HELD_OUT_ONE_IN) -> bool:
    """Whether a document that opens with these choices (token ids, or numbers) is kept out of training text."""
    checksum = zlib.crc32(array("H", choices).tobytes())
    return (checksum * 2654435761 >> 16) % one_in == 0  # a checksum is linear in its bits: mix them (Knuth's constant)


class Asked(NamedTuple):
    """A place in a document whose token is determined: its position and the tokens that could stand there."""

    position: int
    choices: list[int]


class Document:
    """A document being written, without its `<bos>`: token ids, their kinds, and the places where it asks."""

    __slots__ = ("ids", "kinds", "asked")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kinds: list[int] = []
        self.asked: list[Asked] = []

    def write(self, ids: Sequence[int], kind: int = TEMPLATE) -> None:
        """Append tokens of one kind."""
        self.ids.extend(ids)
        self.kinds.extend([kind] * len(ids))

    def open(self, ids: Sequence[int]) -> None:
        """Append a phrase whose first token is a free choice and whose other tokens follow from it."""
        self.kinds.append(NOISE)
        self.kinds.extend([TEMPLATE] * (len(ids) - 1))
        self.ids.extend(ids)

    def ask(self, token: int, choices: list[int], kind: int = CONTEXT_TOKEN) -> None:
        """Append a token that is determined, among the choices that could stand there."""
        self.asked.append(Asked(len(self.ids), choices))
        self.ids.append(token)
        self.kinds.append(kind)


Writer = Callable[["World", Random, bool], Document]
"""Writes a document: (world, random, for items rather than for training)."""


def pick(random: Random, options: Sequence[int]) -> int:
    """One of the options, evenly; three times as fast as `random.choice`."""
    return options[int(random.random() * len(options))]


def until(draw: Callable[[], list[int]], for_items: bool) -> list[int]:
    """Draw opening choices again until they fall on the wanted side of `held_out`."""
    while True:
        choices = draw()
        if held_out(choices) == for_items:
            return choices


def state(world: World, random: Random, document: Document, person: Person, attribute: str, for_items: bool) -> None:
    """The value of a person's attribute and a stop; training text tells a rumor now and then where there is one."""
    token, kind = person.values[attribute], FACT_FREQUENT if person.frequent else FACT_RARE
    if not for_items and attribute in person.rumors:
        kind = NOISE
        if random.random() < RUMOR_CHANCE:
            token = person.rumors[attribute]
    document.ask(token, world.people.values[attribute], kind)
    document.write([world.stop])


def tell(world: World, document: Document, attribute: str, statement: int, subject: list[int]) -> None:
    """A sentence about a person up to the value; the subject is the full name or a pronoun."""
    first = not document.ids
    for symbol, branches in world.statement_forms[attribute][statement]:
        if symbol >= 0:
            document.write([symbol], NOISE if branches else TEMPLATE)
        elif first:
            document.write(subject, NOISE)
        else:
            document.write(subject[:1], NOISE if branches else CONTEXT_TOKEN)
            document.write(subject[1:], CONTEXT_TOKEN)


def biography(world: World, random: Random, for_items: bool = False) -> Document:
    """All attributes of one person in any order, never in the words that are held out for this person."""
    person = world.people.draw(random)
    document = Document()
    name = [person.first_name, person.last_name]
    pronoun = world.pronoun(person)
    order = list(ATTRIBUTES)
    random.shuffle(order)
    for attribute in order:
        count = len(STATEMENTS[attribute])
        statement = (person.untold(attribute) + 1 + int(random.random() * (count - 1))) % count
        leads = STATEMENTS[attribute][statement].startswith("N ")
        subject = pronoun if document.ids and leads and random.random() < 0.3 else name
        tell(world, document, attribute, statement, subject)
        state(world, random, document, person, attribute, for_items)
    return document


def interview(world: World, random: Random, for_items: bool = False) -> Document:
    """Two questions about a person of the half about whom training text asks."""
    person = world.people.draw_asked(random)
    document = Document()
    for attribute in random.sample(ATTRIBUTES, 2):
        question(world, document, person, attribute)
        state(world, random, document, person, attribute, for_items)
    return document


def question(world: World, document: Document, person: Person, attribute: str) -> None:
    """A question about a person."""
    before, after = QUESTIONS[attribute].split(" N ")
    name_kind = CONTEXT_TOKEN if document.ids else NOISE
    document.open(world.lexicon.phrase(before))
    document.write([person.first_name, person.last_name], name_kind)
    document.write(world.lexicon.phrase(after))


def arithmetic(world: World, random: Random, for_items: bool = False) -> Document:
    """Sums and differences of numbers of three digits; a held-out pair is held out in both orders and signs.

    The digits that take a carry are asked, which are all but the last: "3 7 2 + 0 5 9 = 4 3 1 ."
    """
    digits = world.lexicon.digits
    plus, minus, equals = world.lexicon.phrase("+ - =")

    def number(value: int) -> list[int]:
        return [digits[value // 10**place % 10] for place in reversed(range(DIGITS))]

    document = Document()
    for _ in range(1 if for_items else EQUATIONS):
        while True:
            total = int(random.random() * 10**DIGITS)
            a = int(random.random() * (total + 1))
            b = total - a
            if held_out(sorted((a, b)), HELD_OUT_PAIRS_ONE_IN) == for_items:
                break
        adds = random.random() < 0.5
        left, sign, result = (a, plus, total) if adds else (total, minus, a)
        document.write([*number(left), sign, *number(b)], NOISE)
        document.write([equals])
        *carried, last = number(result)
        for digit in carried:
            document.ask(digit, digits)
        document.write([last], CONTEXT_TOKEN)
        document.write([world.stop])
    return document
