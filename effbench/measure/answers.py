"""What a system answered to choices, kept by content: a further task or more items are run, what was answered is not.

<out>/answers/<system>.npz      one file for each system, named by all that its answers depend on
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from effbench.measure.encoding import Choices
from effbench.results import code_digest

KEY_BYTES = 16
"""Of a choice's SHA-256: two of as many as there ever are do not meet."""
TOGETHER = 4000
"""Choices that are answered before they are kept; those behind a run that is killed later are not run again."""
PIECE_BYTES = 1 << 24


class Answers:
    """Answers that are known, from files, and those that are added and written to the first of them.

    reused, asked: how many of the choices that were asked for were known, and how many there were.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self.path = path
        self.reused = self.asked = 0
        self._known: dict[bytes, tuple[float, bool]] = {}
        for file in (*others, path):
            self._known |= _read(file)

    def complete(
        self, choices: Choices, answer: Callable[[Choices], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihood (choices,) of each choice, and whether it is the greedy one; only what is not known yet
        is given to `answer`, and kept."""
        keys = _keys(choices)
        fresh = {key: place for place, key in enumerate(keys) if key not in self._known}
        self.asked += len(keys)
        self.reused += sum(key not in fresh for key in keys)
        for start in range(0, len(fresh), TOGETHER):
            some = list(fresh)[start : start + TOGETHER]
            values, greedy = answer(choices.some([fresh[key] for key in some]))
            self._known |= zip(some, zip(values.tolist(), greedy.tolist(), strict=True), strict=True)
            self._write()
        found = [self._known[key] for key in keys]
        return np.array([value for value, _ in found]), np.array([best for _, best in found], bool)

    def _write(self) -> None:
        """All or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"partial-{os.getpid()}-{self.path.name}")
        np.savez(
            beside,
            keys=np.frombuffer(b"".join(self._known), np.uint8).reshape(-1, KEY_BYTES),
            values=np.array([value for value, _ in self._known.values()]),
            greedy=np.array([best for _, best in self._known.values()], bool),
        )
        beside.replace(self.path)


def _read(path: Path) -> dict[bytes, tuple[float, bool]]:
    """What a file holds; nothing where there is none, or none that is whole."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            keys, values, greedy = file["keys"], file["values"], file["greedy"]
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return {}
    return dict(zip(map(bytes, keys), zip(values.tolist(), greedy.tolist(), strict=True), strict=True))


def _keys(choices: Choices) -> list[bytes]:
    """A choice's name: what its context's and its own tokens are."""
    contexts = [hashlib.sha256(ids.astype("<i8").tobytes()).digest() for ids in choices.contexts]
    tokens = choices.tokens.astype("<i8")
    return [
        hashlib.sha256(contexts[place] + tokens[start : start + length].tobytes()).digest()[:KEY_BYTES]
        for place, start, length in zip(choices.context_of, choices.starts, choices.lengths, strict=True)
    ]


def system_name(folder: Path, *conditions: str) -> str:
    """What names a saved system's answers: every byte of it, the code that asks, the libraries that compute, and the
    `conditions` under which they do, such as the device."""
    name = hashlib.sha256(repr([code_digest(), *map(version, ("torch", "transformers")), *conditions]).encode())
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        name.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                name.update(piece)
    return name.hexdigest()[:24]


def beside(out: Path, system: str) -> Sequence[Path]:
    """Answers of a system called so in other folders beside that of a run."""
    own = out.resolve()
    return sorted(path for path in own.parent.glob(f"*/answers/{system}.npz") if path.parents[1] != own)
