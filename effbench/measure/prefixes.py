"""Sequences that begin alike, laid out so that each common beginning is run once.

A row is a tree of sequences, written from root to leaf and branch by branch. A token sees those on its way to the root,
itself included, and stands as many places from the start as there are of them:

    The cat sat            tokens  The  cat  sat  ran  dog
    The cat ran            place    0    1    2    2    1
    The dog                end      5    4    3    4    5      seen by the later tokens before this slot

Where a model cannot be given such a row, sequences still share one if each is the beginning of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

ATTENTION = 4
"""So many times its width is the number of tokens from which on attention costs a model more than its matrices."""


@dataclass
class Row:
    """One tree of sequences.

    ids, places, ends (tokens,): see above. members: each sequence's number and the slot (length,) of each token.
    """

    ids: np.ndarray
    places: np.ndarray
    ends: np.ndarray
    members: list[tuple[int, np.ndarray]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def branches(self) -> bool:
        """Whether it is more than one sequence and beginnings of it."""
        return bool((self.ends < len(self)).any())


@dataclass
class _Growing:
    """A row while sequences are added to it in order, so that what a new one shares is the last one's beginning."""

    path: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ids: list[np.ndarray] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    closed: list[tuple[np.ndarray, int]] = field(default_factory=list)
    members: list[tuple[int, np.ndarray]] = field(default_factory=list)
    length: int = 0

    def add(self, number: int, sequence: np.ndarray, shared: int) -> None:
        if shared < len(self.path):
            self.closed.append((self.path[shared:], self.length))
        new = len(sequence) - shared
        self.ids.append(sequence[shared:])
        self.places.append(np.arange(shared, len(sequence)))
        self.path = np.concatenate([self.path[:shared], np.arange(self.length, self.length + new)])
        self.length += new
        self.members.append((number, self.path))

    def row(self) -> Row:
        ends = np.full(self.length, self.length)
        for slots, end in self.closed:
            ends[slots] = end
        return Row(np.concatenate(self.ids), np.concatenate(self.places), ends, self.members)


def lay_out(sequences: Sequence[np.ndarray], *, longest: int, branching: bool, width: int) -> list[Row]:
    """All sequences in rows, longest row first.

    A sequence joins a row if what is shared is worth more than attention over a longer row costs, in a model of
    hidden size `width`, and the row does not become longer than `longest`. Without `branching` only sequences that
    continue each other share a row.
    """
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].astype(">u4").tobytes())
    rows: list[Row] = []
    growing, last = _Growing(), np.zeros(0, np.int64)
    for number in order:
        sequence = sequences[number]
        shared = _common(last, sequence)
        new = len(sequence) - shared
        more_attention = (growing.length + new) ** 2 - growing.length**2 - len(sequence) ** 2
        worth = shared == len(last) or (branching and shared > more_attention / (ATTENTION * width))
        if growing.members and not (shared and worth and growing.length + new <= longest):
            rows.append(growing.row())
            growing, shared = _Growing(), 0
        growing.add(number, sequence, shared)
        last = sequence
    if growing.members:
        rows.append(growing.row())
    return sorted(rows, key=len, reverse=True)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences share from the start."""
    least = min(len(one), len(other))
    different = np.flatnonzero(one[:least] != other[:least])
    return int(different[0]) if len(different) else least


def fitting(rows: Sequence[Row], scored: Sequence[int], *, tokens: int, most_scored: int) -> int:
    """How many of the first rows are run together: at most so many `tokens`, filling included, and so many that are
    scored. Rows come longest first; one alone may be larger."""
    asked = scored[0]
    for count in range(1, len(rows)):
        asked += scored[count]
        if (count + 1) * len(rows[0]) > tokens or asked > most_scored:
            return count
    return len(rows)
