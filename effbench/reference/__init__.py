"""The embedded reference family: a synthetic world, a trainer, and small checkpoints that ship with the package.

`world` generates text by seed, `items` asks about it, `train` rebuilds a checkpoint, `outliers` puts stress on one.
Importing this package imports nothing heavy.
"""

import json
from collections.abc import Iterable
from pathlib import Path

NAMES = ("ref-70k", "ref-300k", "ref-1m", "ref-3m")
"""The shipped checkpoints, by the number of their parameters outside the embedding."""

CONTEXT = 512
"""The longest context in tokens that the family is trained on."""


def speaks_reference(vocabulary: Iterable[str]) -> bool:
    """Whether these are the words of the synthetic world: of the family, also where it was compressed and saved."""
    content = json.loads((folder(NAMES[0]) / "tokenizer.json").read_text(encoding="utf-8"))
    return set(vocabulary) == set(content["model"]["vocab"])


def folder(name: str) -> Path:
    """The folder of a shipped checkpoint, in the form that transformers saves and loads."""
    if name not in NAMES:
        raise ValueError(f"no reference model {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).parent / "checkpoints" / name
