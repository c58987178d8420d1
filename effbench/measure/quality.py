"""Perplexity of held-out text, and divergence from the dense model on the same tokens.

Windows are scored by a plain forward pass. A system with another way of keeping keys and values is scored *through*
its cache, in chunks, with explicit positions: a plain pass would never touch it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench.data import Windows
from effbench.technique import CachePolicy, System
from effbench.toolbox.decoding import forward, takes

CHUNK = 64
"""Tokens fed at once when scoring through a cache."""
LOGITS_BYTES = 256 * 2**20
"""The most that a batch's float32 logits may take."""
SLICE_BYTES = 64 * 2**20
"""The most that float32 logits may take that are looked at together; far more than a CPU keeps at hand is slower."""
REFERENCE_BYTES = 512 * 2**20
"""The most that the dense model's log-probabilities may take on disk; divergence is over the tokens that fit."""


class Quality:
    """Sums over each window: nats and scored tokens, also by kind of token, and what divergence needs."""

    def __init__(self, windows: Windows) -> None:
        count, self._windows = len(windows.ids), windows
        self.nats = [0.0] * count
        self.tokens = windows.scored
        self.kind_nats = {name: [0.0] * count for name in windows.kind_names}
        self.kind_tokens = {name: [0] * count for name in windows.kind_names}
        self.divergences = [np.zeros(0, np.float32)] * count
        """The divergence from dense of each window's tokens, or of the first of them; `agreed` counts over those."""
        self.agreed = [0] * count

    def compare(self, place: int, divergence: Tensor, agreed: int) -> None:
        """The divergence (tokens,) of further tokens of window `place`, and how many have the same best token."""
        self.divergences[place] = np.concatenate([self.divergences[place], divergence.cpu().numpy()])
        self.agreed[place] += agreed

    @property
    def compared_tokens(self) -> int:
        """Tokens for which there is a divergence."""
        return sum(map(len, self.divergences))

    @property
    def kl(self) -> list[float]:
        """Sums of divergence over each window."""
        return [float(values.sum(dtype=np.float64)) for values in self.divergences]

    def add(self, place: int, nats: Tensor) -> None:
        """The nats (tokens,) of window `place`."""
        self.nats[place] = float(nats.sum())
        if self._windows.kinds is not None:
            first = self._windows.firsts[place]
            kinds = torch.from_numpy(self._windows.kinds[place][first:].astype(np.int64)).to(nats.device)
            for number, name in enumerate(self._windows.kind_names):
                self.kind_nats[name][place] = float(nats[kinds == number].sum())
                self.kind_tokens[name][place] = int((kinds == number).sum())

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

    def perplexity_per(self, units: int) -> float:
        """exp of the mean over so many words or bytes in place of tokens; infinite where it does not fit a float."""
        mean = sum(self.nats) / units
        return math.exp(mean) if mean < 700 else math.inf


def scored_through_cache(system: System) -> bool:
    """Whether a plain pass would say nothing about this system."""
    return type(system.new_cache) is not CachePolicy


@torch.inference_mode()
def window_logits(
    system: System, ids: Tensor, *, through_cache: bool, chunk: int = CHUNK, keep: int | None = None
) -> Tensor:
    """Logits (batch, tokens, vocabulary) of windows (batch, tokens); of the last `keep` tokens only, if given."""
    ids = ids.to(system.device)
    if not through_cache:
        # a model that cannot leave logits out gives all of them
        able = keep is not None and takes(system.model, "logits_to_keep")
        options = {"logits_to_keep": keep} if able else {}
        logits: Tensor = system.model(input_ids=ids, use_cache=False, **options).logits
        return logits if keep is None else logits[:, -keep:]
    cache = system.new_cache()
    pieces: list[Tensor] = []
    for start in range(0, ids.shape[1], chunk):
        pieces.append(forward(system.model, ids[:, start : start + chunk], cache, start))
        if keep is not None:
            pieces = [torch.cat(pieces, 1)[:, -keep:]]
    return torch.cat(pieces, 1)


class _Logits:
    """What gives the logits of some tokens of windows that are run once.

    The model's head runs when they are asked for, on these tokens only, since over a large vocabulary all logits do
    not stay at hand. That is for models whose logits are what their head gives, which is seen at the first token.
    """

    def __init__(self, system: System, *, through_cache: bool, chunk: int) -> None:
        self._system = system
        self._options: dict[str, Any] = {"through_cache": through_cache, "chunk": chunk}
        head = getattr(system.model, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, nn.Module) and not through_cache else None
        self._seen = False

    @torch.inference_mode()
    def of(self, ids: Tensor) -> Callable[[int, slice], Tensor]:
        """What gives the logits (tokens, vocabulary) of the tokens `slice` of a row of windows (batch, tokens)."""
        head = self._head
        if head is None:
            logits = window_logits(self._system, ids, **self._options)
            return lambda row, here: logits[row, here]
        kept: list[Tensor] = []

        def keep(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
            hidden = arguments[0] if arguments else None
            if not isinstance(hidden, Tensor) or hidden.shape[:-1] != ids.shape:
                return None
            kept.append(hidden)
            return hidden[:, :1], *arguments[1:]

        handle = head.register_forward_pre_hook(keep)
        try:
            logits = window_logits(self._system, ids, **self._options)
        finally:
            handle.remove()
        if not self._seen and (len(kept) != 1 or not torch.equal(head(kept[0][:, :1]), logits)):
            self._head = None  # it runs elsewhere, or what it gives is capped or scaled
            return self.of(ids)
        self._seen = True
        return torch.inference_mode()(lambda row, here: head(kept[0][row : row + 1, here])[0])


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
    firsts = windows.firsts
    logits = _Logits(system, through_cache=through_cache, chunk=chunk)
    for places, ids in _batches(windows, system.config.vocab_size):
        fed = ids[:, : system.context]  # a window may be one token longer: its last one has only to be predicted
        look = logits.of(fed)
        for row, place in enumerate(places):
            count, nats = quality.tokens[place], []
            slices = -(-count * 4 * system.config.vocab_size // SLICE_BYTES)
            at_once = max(1, -(-count // max(1, slices)))  # alike in size: each one reads the whole head
            for start in range(0, count, at_once):
                here = slice(firsts[place] - 1 + start, firsts[place] - 1 + min(start + at_once, count))
                log_probabilities = torch.log_softmax(look(row, here).float(), -1)
                targets = ids[row, 1:][here].to(log_probabilities.device)
                nats.append(-log_probabilities.gather(-1, targets[:, None])[:, 0].double())
                if reference is not None:
                    reference.meet(place, start, log_probabilities, quality)
            quality.add(place, torch.cat(nats))
    return quality


class DenseLogProbabilities:
    """The dense model's log-probabilities on disk: of the first tokens of the text, as many as `REFERENCE_BYTES` hold.

    The dense model writes them as it is scored; every other system meets them mapped, outside its own memory.
    Stored as float32, so that the dense model's divergence from itself is 0.
    """

    def __init__(self, path: Path, windows: Windows, vocabulary: int, *, write: bool) -> None:
        self._starts = np.concatenate([[0], np.array(windows.scored).cumsum()])
        self._write = write
        self._path, self._beside = path, path.with_name(path.name + ".partial")
        self._array: np.ndarray
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (min(int(self._starts[-1]), max(1, REFERENCE_BYTES // (4 * vocabulary))), vocabulary)
            self._array = np.lib.format.open_memmap(self._beside, mode="w+", dtype=np.float32, shape=shape)
        else:
            self._array = np.load(path, mmap_mode="r")

    def meet(self, place: int, start: int, log_probabilities: Tensor, quality: Quality) -> None:
        """Write (tokens, vocabulary) from token `start` of window `place` on, or add its divergence to `quality`."""
        first = int(self._starts[place]) + start
        count = min(len(log_probabilities), len(self._array) - first)
        if count <= 0 or log_probabilities.shape[-1] != self._array.shape[-1]:
            return
        log_probabilities = log_probabilities[:count]
        if self._write:
            self._array[first : first + count] = log_probabilities.cpu().numpy()
            quality.compare(place, torch.zeros(count), count)
            return
        dense = torch.from_numpy(np.array(self._array[first : first + count])).to(log_probabilities.device)
        divergence = (dense.exp() * (dense - log_probabilities)).sum(-1)
        quality.compare(place, divergence, int((dense.argmax(-1) == log_probabilities.argmax(-1)).sum()))

    def finish(self) -> None:
        """Make what was written visible to others."""
        if self._write:
            assert isinstance(self._array, np.memmap)
            self._array.flush()
            self._beside.replace(self._path)
