"""The people of the world and what is true of them: knowledge that can be counted in bits.

After the synthetic biographies (bioS) of "Physics of Language Models: Part 3.1" (Allen-Zhu and Li, 2023) and the count
of stored bits in part 3.3 (2024): each person has a name and four attributes, each a uniform draw from a group of
values, so that a fact costs log2(values in the group) bits. Exposure falls with a person's rank like Zipf's law.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from effbench.reference.lexicon import Lexicon

PEOPLE = 2000
FREQUENT = 400
"""People of rank below this one count as frequent, all others as rare."""

ZIPF_OFFSET = 200
"""Exposure of rank r is in proportion to 1 / (r + offset)."""

DISPUTED_ONE_IN, RUMOR_CHANCE = 5, 0.4
"""One fact in five is disputed: two times in five, text tells a rumor instead, always the same one. A model has to
weigh what it read, so that not even the facts of frequent people become easy."""

ATTRIBUTES = ("birthplace", "employer", "field", "year")

STATEMENTS = {
    "birthplace": (
        "N was born in", "N comes from", "N grew up in", "the hometown of N is", "the birthplace of N is",
    ),
    "employer": (
        "N works for", "N joined", "N is employed by", "the employer of N is", "the company of N is",
    ),
    "field": (
        "N studied", "N majored in", "N has a degree in", "the subject of N is", "the degree of N is in",
    ),
    "year": (
        "N was born around", "N dates from", "N came to life in", "the birth year of N is", "the life of N began in",
    ),
}  # fmt: skip
"""How a fact is told; N stands for the person, the value follows."""

QUESTIONS = {
    "birthplace": "where was N born ?",
    "employer": "who employs N ?",
    "field": "what did N study ?",
    "year": "when was N born ?",
}


@dataclass(frozen=True)
class Person:
    """One person: the rank in exposure, the name's two tokens, the token of each attribute's value, and the token of
    what is rumored instead for those attributes that are disputed."""

    rank: int
    first_name: int
    last_name: int
    values: dict[str, int]
    rumors: dict[str, int]

    @property
    def frequent(self) -> bool:
        """Whether the person is among those that training text speaks of most."""
        return self.rank < FREQUENT

    @property
    def asked(self) -> bool:
        """Whether training text asks questions about this person; about the other half it never does."""
        return self.rank % 2 == 0

    def untold(self, attribute: str) -> int:
        """The index of the statement with which this person's attribute is never told in training text.

        It is one of five, and each of the five is told of other people: to answer through it, a model must have
        stored the fact apart from the words in which it was read.
        """
        return (self.rank // 2 + ATTRIBUTES.index(attribute)) % len(STATEMENTS[attribute])


class People:
    """Everyone, most frequent first."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        random = Random(seed)
        self.values = {
            "birthplace": lexicon.towns,
            "employer": lexicon.firms,
            "field": lexicon.fields,
            "year": lexicon.years,
        }
        names = [(first, last) for first in lexicon.first_names for last in lexicon.last_names]
        self.people = [self._person(random, rank, *name) for rank, name in enumerate(random.sample(names, PEOPLE))]
        self._exposure = list(accumulate(1 / (rank + ZIPF_OFFSET) for rank in range(PEOPLE)))

    def _person(self, random: Random, rank: int, first_name: int, last_name: int) -> Person:
        values = {attribute: random.choice(group) for attribute, group in self.values.items()}
        rumors = {
            attribute: random.choice([other for other in group if other != values[attribute]])
            for attribute, group in self.values.items()
            if random.randrange(DISPUTED_ONE_IN) == 0
        }
        return Person(rank, first_name, last_name, values, rumors)

    def draw(self, random: Random) -> Person:
        """A person, by exposure."""
        return self.people[bisect_right(self._exposure, random.random() * self._exposure[-1])]

    def draw_asked(self, random: Random) -> Person:
        """A person about whom training text asks, by exposure."""
        rank = self.draw(random).rank
        return self.people[rank - rank % 2]
