"""What there is to ask for: techniques, tasks, models and suites. Reads file names and first lines only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from effbench import reference, registry, suite

KINDS = ("techniques", "tasks", "models", "suites")


def listing(kind: str) -> list[dict[str, Any]]:
    """The entries of one of `KINDS`, each with a name and a line about it."""
    return {"techniques": _techniques, "tasks": _tasks, "models": _models, "suites": _suites}[kind]()


def show(kind: str, console: Console) -> None:
    """Print one kind of entries."""
    entries = listing(kind)
    drawn = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, title=None)
    for place, name in enumerate(entries[0] if entries else ()):
        drawn.add_column(name, style="bold" if place == 0 else "", no_wrap=place == 0, overflow="fold")
    for entry in entries:
        drawn.add_row(*("" if value is None else str(value) for value in entry.values()))
    console.print(drawn, highlight=False)


def _techniques() -> list[dict[str, Any]]:
    entries = registry.entries()
    return [
        {"name": name, "family": entries[name].family, "summary": entries[name].summary} for name in registry.names()
    ]


def _tasks() -> list[dict[str, Any]]:
    return [{"name": name, "summary": _first_comment(path)} for name, path in registry.tasks().items()]


def _suites() -> list[dict[str, Any]]:
    found = []
    for name, path in suite.names().items():
        loaded = suite.load(name)
        rows = len({"dense", *loaded.techniques})
        found.append({"name": name, "model": loaded.model, "rows": rows, "summary": _first_comment(path)})
    return found


def _models() -> list[dict[str, Any]]:
    found = []
    for name in reference.NAMES:
        folder = reference.folder(name)
        config = _config(folder / "config.json")
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        shape = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}" if config else "not built"
        words = config.get("vocab_size")
        found.append({"name": name, "shape": shape, "vocabulary": words, "file_bytes": weights or None})
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
