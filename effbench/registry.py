"""Which techniques there are, and how a pipeline of them is written.

A technique is a file `techniques/<family>/<name>.py` with one `Technique` in it, or an entry point of the group
`effbench.techniques` whose name is `<family>.<name>`. Listing looks at file names only; `get` imports one module.
A pipeline is written left to right: `wanda:sparsity=0.5+rtn:bits=4`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.errors import PackageError, TechniqueError

if TYPE_CHECKING:
    from effbench.technique import Technique

FOLDER = "effbench.techniques"


@dataclass(frozen=True)
class Entry:
    """Where a technique lives."""

    name: str
    family: str
    module: str
    path: Path | None = None

    @property
    def summary(self) -> str:
        """The first line of the file's docstring, read without importing it."""
        if self.path is None:
            return f"from {self.module}"
        text = ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""
        return text.partition("\n")[0]


@cache
def entries() -> dict[str, Entry]:
    """All techniques by name.

    Raises `TechniqueError` where two have the same name.
    """
    found: dict[str, Entry] = {}
    package = import_module(FOLDER)
    for folder in package.__path__:
        for path in sorted(Path(folder).glob("*/*.py")):
            if not path.stem.startswith("_"):
                _add(found, Entry(path.stem, path.parent.name, f"{FOLDER}.{path.parent.name}.{path.stem}", path))
    for point in entry_points(group=FOLDER):
        family, _, name = point.name.rpartition(".")
        _add(found, Entry(name, family or "other", point.module))
    return found


def _add(found: dict[str, Entry], entry: Entry) -> None:
    other = found.get(entry.name)
    if other:
        raise TechniqueError(
            f"two techniques are called {entry.name!r}: {other.module} and {entry.module}; rename one of them"
        )
    found[entry.name] = entry


def names() -> list[str]:
    """The names of all techniques, family by family."""
    return [entry.name for entry in sorted(entries().values(), key=lambda e: (e.family, e.name))]


def tasks() -> dict[str, Path]:
    """The tasks that come with effbench, by name: lm-eval files, one for each."""
    folders = import_module("effbench.tasks").__path__
    found = sorted(path for folder in folders for path in Path(folder).glob("*.yaml"))
    return {path.stem: path for path in found if not path.stem.startswith("_")}


def suggest(word: str, known: Sequence[str]) -> str:
    """` did you mean 'x'?` where something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def get(name: str) -> type[Technique]:
    """The technique's class; only its own module is imported.

    Raises `TechniqueError` for an unknown name or a module without a technique, `PackageError` for a missing
    optional package.
    """
    from effbench.technique import LayerTechnique, Technique

    entry = entries().get(name)
    if entry is None:
        hint = suggest(name, names())
        raise TechniqueError(f"no technique {name!r}{hint} (`effbench list` shows all {len(entries())})")
    try:
        module = import_module(entry.module)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("effbench"):
            raise
        raise PackageError(
            f"technique {name!r} needs the package {missing.name!r}, which is not installed; pip install it"
        ) from missing
    found = [
        item
        for item in vars(module).values()
        if inspect.isclass(item)
        and issubclass(item, Technique)
        and item.__module__ == module.__name__
        and item not in (Technique, LayerTechnique)
    ]
    if len(found) != 1:
        raise TechniqueError(f"{entry.module} must define exactly one Technique, it defines {len(found)}")
    return found[0]


def build(name: str, options: dict[str, str], seed: int | None = None) -> Technique:
    """The technique with options given as text.

    `seed` is used by a technique that has such an option and was not told one.
    Raises `TechniqueError` for an unknown option, a value of the wrong type or one out of range.
    """
    kind = get(name)
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            hint = suggest(option, list(known))
            listed = ", ".join(known) or "none"
            raise TechniqueError(f"technique {name!r} has no option {option!r}{hint} (it has: {listed})")
        values[option] = _convert(name, option, text, known[option].default)
    if seed is not None and "seed" in known:
        values.setdefault("seed", seed)
    try:
        return kind(**values)
    except (ValueError, TypeError) as wrong:
        raise TechniqueError(f"technique {name!r}: {wrong}") from wrong


def _convert(name: str, option: str, text: str, default: Any) -> Any:
    """`text` as the type of the option's default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise TechniqueError(f"technique {name!r}: option {option} must be {kind}, got {text!r}") from None
    return text


def split(pipeline: str) -> list[tuple[str, dict[str, str]]]:
    """The names and options of a pipeline, as written.

    The empty pipeline and `dense` are the model as it is. Raises `TechniqueError` where the text is malformed.
    """
    text = pipeline.strip()
    if text in ("", "dense"):
        return []
    shape = "write it as name:option=value,option=value+name"
    steps = []
    for step in text.split("+"):
        name, colon, rest = (piece.strip() for piece in step.partition(":"))
        if not name or (colon and not rest):
            raise TechniqueError(f"pipeline {pipeline!r} is malformed near {step!r}: {shape}")
        options: dict[str, str] = {}
        for pair in rest.split(",") if rest else []:
            option, equals, value = (piece.strip() for piece in pair.partition("="))
            if not (option and equals and value):
                raise TechniqueError(f"pipeline {pipeline!r} is malformed near {pair!r}: {shape}")
            if option in options:
                raise TechniqueError(f"pipeline {pipeline!r} gives {option!r} twice")
            options[option] = value
        steps.append((name, options))
    return steps


def parse(pipeline: str, seed: int | None = None) -> list[Technique]:
    """The techniques of a pipeline, in the order in which they are applied."""
    return [build(name, options, seed) for name, options in split(pipeline)]


def canonical(pipeline: str) -> str:
    """The one way in which a pipeline is written in records: options asked for, in the order of the fields.

    Raises `TechniqueError` as `parse` does.
    """
    steps = []
    for (name, options), technique in zip(split(pipeline), parse(pipeline), strict=True):
        asked = [f.name for f in fields(technique) if f.name in options]
        listed = ",".join(f"{option}={_write(getattr(technique, option))}" for option in asked)
        steps.append(f"{name}:{listed}" if listed else name)
    return "+".join(steps) or "dense"


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short
