"""Perplexity of held-out text, and divergence from the dense model on the same tokens.

Windows are scored by a plain forward pass. A system with another way of keeping keys and values is scored *through*
its cache, in chunks, with explicit positions: a plain pass would never touch it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effbench.data import Windows
from effbench.technique import CachePolicy, System
from effbench.toolbox.decoding import forward

CHUNK = 64
"""Tokens fed at once when scoring through a cache."""
LOGITS_BYTES = 256 * 2**20
"""The most that a batch's float32 logits may take."""
REFERENCE_BYTES = 512 * 2**20
"""The most that the dense model's log-probabilities may take on disk; divergence is over the windows that fit."""


class Quality:
    """Sums over each window: nats and scored tokens, also by kind of token, and what divergence needs."""

    def __init__(self, windows: Windows) -> None:
        count, self._windows = len(windows.ids), windows
        self.nats = [0.0] * count
        self.tokens = [len(window) - 1 for window in windows.ids]
        self.kind_nats = {name: [0.0] * count for name in windows.kind_names}
        self.kind_tokens = {name: [0] * count for name in windows.kind_names}
        self.kl: dict[int, float] = {}
        self.agreed: dict[int, int] = {}

    def add(self, place: int, nats: Tensor) -> None:
        """The nats (tokens,) of window `place`."""
        self.nats[place] = float(nats.sum())
        if self._windows.kinds is not None:
            kinds = torch.from_numpy(self._windows.kinds[place][1:].astype(np.int64)).to(nats.device)
            for number, name in enumerate(self._windows.kind_names):
                self.kind_nats[name][place] = float(nats[kinds == number].sum())
                self.kind_tokens[name][place] = int((kinds == number).sum())

    @property
    def compared_tokens(self) -> int:
        """Tokens of the windows for which there is a divergence."""
        return sum(self.tokens[place] for place in self.kl)

    @property
    def nll_per_token(self) -> float:
        """Mean nats of a scored token."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where it does not fit a float."""
        return math.exp(self.nll_per_token) if self.nll_per_token < 700 else math.inf

    def bits_per_byte(self, bytes_scored: int) -> float:
        """Bits for each byte of the text that was scored."""
        return sum(self.nats) / math.log(2) / bytes_scored


def scored_through_cache(system: System) -> bool:
    """Whether a plain pass would say nothing about this system."""
    return type(system.new_cache) is not CachePolicy


@torch.inference_mode()
def window_logits(system: System, ids: Tensor, *, through_cache: bool, chunk: int = CHUNK) -> Tensor:
    """Logits (batch, tokens, vocabulary) of windows (batch, tokens)."""
    ids = ids.to(system.device)
    if not through_cache:
        logits: Tensor = system.model(input_ids=ids, use_cache=False).logits
        return logits
    cache = system.new_cache()
    pieces = [
        forward(system.model, ids[:, start : start + chunk], cache, start) for start in range(0, ids.shape[1], chunk)
    ]
    return torch.cat(pieces, 1)


def _batches(windows: Windows, vocabulary: int) -> Iterator[tuple[list[int], Tensor]]:
    """Windows of similar length together, longest first, as many as `LOGITS_BYTES` allows.

    Shorter ones are filled up at the end, where no scored token can see it.
    """
    order = sorted(range(len(windows.ids)), key=lambda place: -len(windows.ids[place]))
    while order:
        length = len(windows.ids[order[0]])
        count = max(1, LOGITS_BYTES // (length * vocabulary * 4))
        places, order = order[:count], order[count:]
        ids = np.zeros((len(places), length), np.int64)
        for row, place in enumerate(places):
            ids[row, : len(windows.ids[place])] = windows.ids[place]
        yield places, torch.from_numpy(ids)


def score(
    system: System,
    windows: Windows,
    reference: DenseLogProbabilities | None = None,
    *,
    through_cache: bool | None = None,
    chunk: int = CHUNK,
) -> Quality:
    """Score all windows; with a `reference` also the divergence from it (or its making, see there)."""
    if through_cache is None:
        through_cache = scored_through_cache(system)
    quality = Quality(windows)
    for places, ids in _batches(windows, system.config.vocab_size):
        logits = window_logits(system, ids, through_cache=through_cache, chunk=chunk)
        for row, place in enumerate(places):
            count = len(windows.ids[place]) - 1
            log_probabilities = torch.log_softmax(logits[row, :count].float(), -1)
            targets = ids[row, 1 : count + 1].to(logits.device)
            quality.add(place, -log_probabilities.gather(-1, targets[:, None])[:, 0].double())
            if reference is not None:
                reference.meet(place, log_probabilities, quality)
    return quality


class DenseLogProbabilities:
    """The dense model's log-probabilities on disk, one file for the first windows that fit `REFERENCE_BYTES`.

    The dense model writes them as it is scored; every other system meets them mapped, outside its own memory.
    Stored as float32, so that the dense model's divergence from itself is 0.
    """

    def __init__(self, path: Path, windows: Windows, vocabulary: int, *, write: bool) -> None:
        lengths = np.array([len(window) - 1 for window in windows.ids])
        self._starts = np.concatenate([[0], lengths.cumsum()])
        self.windows = int(np.searchsorted(self._starts[1:], REFERENCE_BYTES // (4 * vocabulary), side="right"))
        shape = (int(self._starts[self.windows]), vocabulary)
        self._write = write
        self._path, self._beside = path, path.with_name(path.name + ".partial")
        self._array: np.ndarray
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._array = np.lib.format.open_memmap(self._beside, mode="w+", dtype=np.float32, shape=shape)
        else:
            self._array = np.load(path, mmap_mode="r")

    def meet(self, place: int, log_probabilities: Tensor, quality: Quality) -> None:
        """Write (tokens, vocabulary) of window `place`, or add its divergence to `quality`."""
        if place >= self.windows:
            return
        rows = slice(int(self._starts[place]), int(self._starts[place + 1]))
        if self._write:
            self._array[rows] = log_probabilities.cpu().numpy()
            quality.kl[place], quality.agreed[place] = 0.0, len(log_probabilities)
            return
        dense = torch.from_numpy(np.array(self._array[rows])).to(log_probabilities.device)
        quality.kl[place] = float((dense.exp() * (dense - log_probabilities)).sum().double())
        quality.agreed[place] = int((dense.argmax(-1) == log_probabilities.argmax(-1)).sum())

    def finish(self) -> None:
        """Make what was written visible to others."""
        if self._write:
            assert isinstance(self._array, np.memmap)
            self._array.flush()
            self._beside.replace(self._path)
