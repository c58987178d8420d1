"""The only door to text. What is handed out for calibration and training is counted.

A source of text is cut in two: the evaluation part, which only the harness reads, and the training part, which
techniques may read through `Data`, for calibration too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from effbench.errors import TextError, UnfitError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from effbench.technique import System

CALIBRATION_SHARE = 0.25
"""How much of a user's only text is kept for calibration and training; the rest is evaluated."""

DOCUMENTS = 16
"""Of fewer documents than this, or of one stream, each window stands for itself when errors are computed."""


@dataclass(frozen=True)
class Windows:
    """Token ids to be scored: non-overlapping windows, each predicted from its own tokens only.

    `kinds`, one number a token, says what sort of token it is where the text knows (see `kind_names`).
    `read_only` tokens at the start of each window are not scored; unless given, the first one. `bytes_scored` are
    UTF-8 bytes, `words_scored` runs of them without white space, both of what is scored. `text_tokens` are all
    tokens of the text that the windows of up to `window_tokens` were cut from; 0 where that is not known.
    `documents` numbers the document that each window was cut from, where some are longer than a window.
    """

    ids: list[np.ndarray]
    bytes_scored: int
    kinds: list[np.ndarray] | None = None
    kind_names: tuple[str, ...] = ()
    words_scored: int = 0
    read_only: list[int] | None = None
    text_tokens: int = 0
    window_tokens: int = 0
    documents: np.ndarray | None = None

    @property
    def firsts(self) -> list[int]:
        """The place of the first scored token of each window."""
        return self.read_only or [1] * len(self.ids)

    @property
    def scored(self) -> list[int]:
        """How many tokens of each window are scored."""
        return [len(ids) - first for ids, first in zip(self.ids, self.firsts, strict=True)]

    def save(self, path: Path) -> None:
        """Write it as arrays."""
        lengths = np.array([len(ids) for ids in self.ids])
        kinds = np.concatenate(self.kinds) if self.kinds is not None else np.zeros(0, np.uint8)
        names = np.array(self.kind_names, dtype=str)
        counts = np.array([self.bytes_scored, self.words_scored, self.text_tokens, self.window_tokens])
        np.savez(
            path,
            ids=np.concatenate(self.ids),
            lengths=lengths,
            kinds=kinds,
            names=names,
            counts=counts,
            firsts=np.array(self.firsts),
            documents=np.zeros(0, np.int64) if self.documents is None else self.documents,
        )

    @classmethod
    def load(cls, path: Path) -> Windows:
        """What `save` wrote."""
        with np.load(path) as stored:
            cuts = stored["lengths"].cumsum()[:-1]
            kinds = np.split(stored["kinds"], cuts) if len(stored["kinds"]) else None
            names = tuple(str(name) for name in stored["names"])
            ids, firsts = np.split(stored["ids"], cuts), stored["firsts"].tolist()
            scored_bytes, words, tokens, window = stored["counts"].tolist()
            documents = stored["documents"] if len(stored["documents"]) else None
            return cls(ids, scored_bytes, kinds, names, words, firsts, tokens, window, documents)

    @property
    def digest(self) -> str:
        """A fingerprint of the tokens, and of which are scored where that is not all but the first."""
        content = [window.astype(np.int64).tobytes() for window in self.ids]
        if set(self.firsts) != {1}:
            content.append(repr(self.firsts).encode())
        return hashlib.sha256(b"".join(content)).hexdigest()[:16]


class Source(Protocol):
    """Where text comes from."""

    def evaluation(self, length: int, limit: int | None) -> Windows:
        """Up to `limit` windows of up to `length` tokens from the part that techniques never see."""

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        """Token ids (count, length) from the part that techniques may see."""


class WorldSource:
    """The synthetic world's streams: endless for training, a fixed held-out one for evaluation."""

    rows = 256
    """Held-out rows that are scored unless a limit is given; they resolve a paired difference of 0.001 nats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from effbench.reference.world import HELDOUT_SEED, KINDS, TRAIN_SEED, World

        self._world, self._kinds = World(), tuple(KINDS)
        self._train_seed, self._heldout_seed = TRAIN_SEED, HELDOUT_SEED
        self._tokenizer = tokenizer

    def evaluation(self, length: int, limit: int | None) -> Windows:
        stream = self._world.stream(min(limit or self.rows, self.rows), length, self._heldout_seed)
        words = np.array([len(word.encode()) + 1 for word in self._world.vocabulary])
        ids = [row.astype(np.int64) for row in stream.ids]
        scored = int(sum(words[row[1:]].sum() for row in ids))
        tokens = sum(len(row) for row in ids)
        return Windows(ids, scored, list(stream.kinds), self._kinds, tokens - len(ids), None, tokens, length)

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        return self._world.stream(count, length, self._train_seed + 1 + seed).ids.astype(np.int64)


class FileSource:
    """A user's text. Without a second file for calibration the first quarter of it is set apart for that.

    A `.txt` file is one stream, cut into windows, as in the papers' protocol. In a `.jsonl` file each `text` is a
    document of its own: it starts with what the tokenizer starts a text with, and only a long one is cut.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, calibration: Path | None = None) -> None:
        self.path, self._tokenizer = path, tokenizer
        self._evaluation = self._encode(path)
        if calibration is not None:
            self._training = np.concatenate(self._encode(calibration))
        elif len(self._evaluation) > 1:
            cut = max(1, int(len(self._evaluation) * CALIBRATION_SHARE))
            self._training = np.concatenate(self._evaluation[:cut])
            self._evaluation = self._evaluation[cut:]
        else:
            cut = int(len(self._evaluation[0]) * CALIBRATION_SHARE)
            self._training, self._evaluation = self._evaluation[0][:cut], [self._evaluation[0][cut:]]

    def _encode(self, path: Path) -> list[np.ndarray]:
        """The token ids of each document."""
        documents, stream, tokenizer = read_documents(path), path.suffix == ".txt", self._tokenizer
        unknown = tokenizer.unk_token_id
        if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            unknown = None  # it stands for other things too, and these tokenizers know every byte
        encoded = []
        for text in documents:
            ids = np.array(self._tokenizer(text, add_special_tokens=not stream, verbose=False)["input_ids"], np.int64)
            if unknown is not None and (ids == unknown).any():
                words = (word for word in text.split() if unknown in self._tokenizer.encode(word))
                raise TextError(
                    f"{path} holds words outside the model's vocabulary, {next(words, '')!r} for one; scoring unknown "
                    "words would say nothing. Leave --text out (the reference models bring their own), or give "
                    "another model"
                )
            encoded.append(ids)
        return encoded

    def evaluation(self, length: int, limit: int | None) -> Windows:
        cut = [
            (number, ids[start : start + length])
            for number, ids in enumerate(self._evaluation)
            for start in range(0, len(ids), length)
        ]
        cut = [(number, window) for number, window in cut if len(window) > 1][:limit]
        windows = [window for _, window in cut]
        if not windows:
            raise TextError(f"{self.path} has too few tokens to score; give a longer text")
        texts = [self._tokenizer.decode(window[1:]) for window in windows]
        scored, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
        tokens = sum(map(len, self._evaluation))
        _, documents = np.unique([number for number, _ in cut], return_inverse=True)
        few = documents[-1] + 1 < DOCUMENTS or len(windows) == documents[-1] + 1
        return Windows(windows, scored, None, (), words, None, tokens, length, None if few else documents)

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        if len(self._training) < 2:
            raise UnfitError("needs calibration text and the text given is too short; use --calibration FILE")
        ids = self._training if len(self._training) >= length else np.resize(self._training, length)
        starts = np.random.default_rng(seed).integers(0, len(ids) - length + 1, count)
        return np.stack([ids[start : start + length] for start in starts])


def read_documents(path: Path, *, blank: bool = False) -> list[str]:
    """The documents of a `.txt` or `.jsonl` file; those with nothing in them only if `blank`.

    Raises `TextError` where it is missing, empty or of another form.
    """
    if not path.is_file():
        raise TextError(f"no text file {path}; give the path of a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise TextError(f'text must be a .txt file, or a .jsonl file with a "text" in each line; got {path.name}')
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n") if path.suffix == ".jsonl" else []
        documents = [json.loads(line)["text"] for line in lines if line.strip()] if lines else [text]
    except UnicodeDecodeError:
        raise TextError(f"{path} is not UTF-8 text; convert it first") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise TextError(f'{path} must have a JSON object with a "text" in each line, and has a line without') from None
    if not blank:
        documents = [document for document in documents if document.strip()]
    if not any(map(str.strip, documents)):
        raise TextError(f"{path} is empty; give a file with text in it")
    return documents


@dataclass
class Data:
    """What a technique is given: calibration and training text, and other models by name.

    `tokens` counts what was handed out. Without a source, asking for text raises `UnfitError`.
    """

    source: Source | None
    context: int
    load: Callable[[str], System]
    seed: int = 0
    tokens: int = field(default=0, init=False)
    watch: Callable[[np.ndarray], None] | None = field(default=None, init=False)
    """Is shown all that is handed out."""

    def calibration(self, samples: int = 128, length: int | None = None) -> Tensor:
        """Token ids (samples, length) from the calibration split; the model's context unless a length is given."""
        return self._take(samples, length, self.seed)

    def batches(
        self, steps: int, batch_size: int, length: int | None = None, *, tokens: int = 0, seed: int | None = None
    ) -> Iterator[Tensor]:
        """`steps` batches of token ids (batch_size, length) from the training split, drawn anew each time.

        With `tokens`, only so many are drawn, in whole rows, and read over and over, each time in another order;
        they are counted once. `seed` is the run's unless given.
        """
        first = 1_000_003 * ((self.seed if seed is None else seed) + 1)
        if not tokens:
            for step in range(steps):
                yield self._take(batch_size, length, first + step)
            return
        import torch

        rows = self._take(max(1, tokens // min(length or self.context, self.context)), length, first)
        generator, order = torch.Generator().manual_seed(first), torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
            yield rows[order[:batch_size]]
            order = order[batch_size:]

    def model(self, name: str) -> System:
        """Another model by name, dense, in the run's dtype and on its device."""
        return self.load(name)

    def _take(self, count: int, length: int | None, seed: int) -> Tensor:
        import torch

        if self.source is None:
            raise UnfitError("needs calibration text and none was given; use --text FILE or --calibration FILE")
        ids = torch.from_numpy(self.source.training(count, min(length or self.context, self.context), seed))
        self.tokens += ids.numel()
        if self.watch is not None:
            self.watch(ids.numpy())
        return ids
