"""The synthetic world: an endless, deterministic stream of text by seed, with a tag for every token.

    world = World()
    stream = world.stream(rows=256, length=512, seed=HELDOUT_SEED)

The generator ships, the text does not. Which documents training text may hold is decided in `documents.held_out` and
`people.Person`; nothing else keeps the zero-shot items apart from it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import numpy as np

from effbench.reference import contexts, documents
from effbench.reference.documents import KINDS, TEMPLATE, Document, Writer
from effbench.reference.lexicon import Lexicon
from effbench.reference.people import ATTRIBUTES, STATEMENTS, People, Person

__all__ = ["HELDOUT_SEED", "ITEM_SEED", "KINDS", "TRAIN_SEED", "Stream", "World"]

HELDOUT_SEED = 1
"""Seed of the held-out stream. Seeds below `TRAIN_SEED` are never trained on."""

ITEM_SEED = 2
"""Seed of the zero-shot items."""

TRAIN_SEED = 1_000_000
"""Seeds from here on are for training and calibration."""

SHARES: dict[Writer, float] = {
    documents.biography: 0.37,
    documents.interview: 0.08,
    documents.arithmetic: 0.06,
    contexts.key_value_list: 0.10,
    contexts.find_in_list: 0.03,
    contexts.copying: 0.05,
    contexts.story: 0.14,
    contexts.agreement: 0.07,
    contexts.inference: 0.10,
}
"""Share of the tokens that each kind of document has in a stream, without the long lists that open some rows."""

LONG_LIST_SHARE = 0.1
"""Share of the rows that open with a list of `SHORTEST_LONG_LIST` pairs or more, so that answers lie far back."""

SHORTEST_LONG_LIST = 30


@dataclass(frozen=True)
class Stream:
    """Rows of tokens: `ids` uint16 (rows, length) and `kinds` uint8 (rows, length), an index into `KINDS`."""

    ids: np.ndarray
    kinds: np.ndarray


class World:
    """Words, people and facts by seed; the text they are told in by the seed of a stream."""

    def __init__(self, seed: int = 0) -> None:
        self.lexicon = Lexicon(seed)
        self.vocabulary: list[str] = self.lexicon.words
        self.people = People(self.lexicon, seed)
        self.bos = self.lexicon.ids["<bos>"]
        self.stop = self.lexicon.ids["."]
        self._pronouns = self.lexicon.phrase("he"), self.lexicon.phrase("she")
        self._he_names = set(self.lexicon.he_names)
        self.statement_forms = self._statement_forms()
        self._writers = list(SHARES)
        self._writer_chances = self._chances()

    def pronoun(self, person: Person) -> list[int]:
        """He or she, by the person's first name."""
        return self._pronouns[person.first_name not in self._he_names]

    def stream(self, rows: int, length: int, seed: int) -> Stream:
        """Rows of whole documents, the last of each row cut where the row ends; `<bos>` opens every document."""
        random = Random(seed)
        ids = np.empty((rows, length), np.uint16)
        kinds = np.empty((rows, length), np.uint8)
        for row in range(rows):
            row_ids: list[int] = []
            row_kinds: list[int] = []
            while len(row_ids) < length:
                document = self._document(random, length if not row_ids else 0)
                row_ids.append(self.bos)
                row_ids.extend(document.ids)
                row_kinds.append(TEMPLATE)
                row_kinds.extend(document.kinds)
            ids[row] = row_ids[:length]
            kinds[row] = row_kinds[:length]
        return Stream(ids, kinds)

    def _document(self, random: Random, room: int) -> Document:
        """The next document; `room` is the length of the row where the document opens one, otherwise 0."""
        longest = min(room // 5, contexts.LONGEST_LIST)
        if longest > SHORTEST_LONG_LIST and random.random() < LONG_LIST_SHARE:
            count = SHORTEST_LONG_LIST + int(random.random() * (longest - SHORTEST_LONG_LIST))
            return contexts.key_value_list(self, random, count=count, room=room - 1)
        writer = self._writers[bisect_right(self._writer_chances, random.random() * self._writer_chances[-1])]
        return writer(self, random, False)

    def _chances(self) -> list[float]:
        """Cumulative chance of each writer, so that its documents take their share of the tokens."""
        random = Random(0)
        chances = []
        for writer, share in SHARES.items():
            tokens = sum(1 + len(writer(self, random, False).ids) for _ in range(100)) / 100
            chances.append(share / tokens)
        return list(accumulate(chances))

    def _statement_forms(self) -> dict[str, list[list[tuple[int, bool]]]]:
        """For each statement its tokens (-1 for the person) and whether the text before leaves that token open."""
        split = {attribute: [text.split() for text in STATEMENTS[attribute]] for attribute in ATTRIBUTES}
        everything = [words for sentences in split.values() for words in sentences]

        def branches(words: list[str], index: int) -> bool:
            followers = {other[index] for other in everything if other[:index] == words[:index] and len(other) > index}
            return len(followers) > 1

        return {
            attribute: [
                [
                    (-1 if word == "N" else self.lexicon.ids[word], branches(words, index))
                    for index, word in enumerate(words)
                ]
                for words in sentences
            ]
            for attribute, sentences in split.items()
        }
