"""Whether what a technique has read is what it is evaluated on: runs of tokens that stand in both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RUN = 48
"""Tokens that have to be the same in a row.

Long enough that a generator of sentences, whose templates and facts come again and again, does not produce the same
run twice by chance (what the embedded world repeats most is well below it, see the tests), and that licences and set
phrases of real text are not taken for leakage; short enough for a paragraph. Lee et al. (2022, Deduplicating Training
Data Makes Language Models Better) take 50.
"""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""An odd number with its bits well mixed: the base of a rolling hash modulo 2^64."""


class Overlap:
    """The evaluated windows, indexed by a hash of each of their runs; `meet` marks what was read of them.

    Two different runs share a hash with a chance of 2^-64 for each pair. Windows shorter than a run are not looked at.
    """

    def __init__(self, windows: Sequence[np.ndarray]) -> None:
        self._windows = windows
        self._hashes = [_hashes(ids[None])[0] for ids in windows]
        self._known = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._hashes]))
        self._found = np.zeros(len(self._known), bool)

    def meet(self, ids: np.ndarray) -> None:
        """Note that rows of tokens (rows, tokens) were read."""
        read = _hashes(np.asarray(ids)).ravel()
        if len(read) and len(self._known):
            places = np.minimum(np.searchsorted(self._known, read), len(self._known) - 1)
            self._found[places[self._known[places] == read]] = True

    @property
    def tokens_read(self) -> list[int]:
        """How many tokens of each window stand in a run that was read."""
        counts = []
        for ids, hashes in zip(self._windows, self._hashes, strict=True):
            seen = self._found[np.searchsorted(self._known, hashes)] if len(hashes) else np.zeros(0, bool)
            edges = np.zeros(len(ids) + 1, np.int64)
            starts = np.flatnonzero(seen)
            np.add.at(edges, starts, 1)
            np.add.at(edges, starts + RUN, -1)
            counts.append(int((edges.cumsum() > 0).sum()))
        return counts

    @property
    def share(self) -> float:
        """The share of all evaluated tokens that were read."""
        return sum(self.tokens_read) / max(1, sum(map(len, self._windows)))


def _hashes(rows: np.ndarray) -> np.ndarray:
    """A hash of each run of `RUN` tokens of each row: (rows, tokens - RUN + 1)."""
    count = rows.shape[1] - RUN + 1
    if count < 1:
        return np.zeros((len(rows), 0), np.uint64)
    ids, found = rows.astype(np.uint64) + np.uint64(1), np.zeros((len(rows), count), np.uint64)
    with np.errstate(over="ignore"):
        for shift in range(RUN):
            found *= FACTOR
            found += ids[:, shift : shift + count]
        return found ^ (found >> np.uint64(29))
