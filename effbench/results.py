"""A record: what was asked and what was measured, one JSON file for each pipeline and seed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from effbench import reference, registry
from effbench.errors import RecordError

SCHEMA = 1
STATUSES = ("ok", "unfit", "failed", "out_of_memory", "timeout")
BESIDE_WEIGHTS = (".json", ".bin", ".pt", ".model", ".txt", ".py", ".jinja")
"""Of a checkpoint: config, structure, tokenizer, code of its own, and weights of other formats."""
PACKAGES = ("torch", "transformers", "lm-eval", "numpy", "safetensors")


@dataclass
class Record:
    """One row.

    `values` are measured figures by column name, `missing` says why others are not there, `samples` keeps the raw
    figures from which intervals and paired differences are computed when reading. `cost` is that of applying.
    `measured` gives the seconds that each finished measure took; `status` is one of `STATUSES`, or "running".
    """

    suite: str
    model: str
    pipeline: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    reason: str | None = None
    cost: dict[str, float | None] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def put(self, name: str, value: float | None, why_missing: str = "") -> None:
        """Set a column; a value of `None` needs a reason."""
        self.values[name] = value
        if value is None:
            self.missing[name] = why_missing
        else:
            self.missing.pop(name, None)

    @property
    def slug(self) -> str:
        """The name of its file, without the ending."""
        return slug(self.pipeline, self.seed)


def slug(pipeline: str, seed: int) -> str:
    """A file name for a pipeline: readable, and unique by a hash where characters had to be replaced."""
    readable = re.sub(r"[^A-Za-z0-9_.=+,-]", "_", pipeline.replace(":", "-"))
    if len(readable) > 100 or "_" in readable:
        readable = f"{readable[:80]}-{hashlib.sha256(pipeline.encode()).hexdigest()[:8]}"
    return f"{readable}--seed{seed}"


def path_of(record: Record, folder: Path) -> Path:
    """Where `save` puts it."""
    return folder / "records" / f"{record.slug}.json"


def save(record: Record, folder: Path) -> Path:
    """Write it, all or nothing: a reader sees the old record or the new one.

    Raises `RecordError` where the folder cannot be written.
    """
    path = path_of(record, folder)
    write_atomically(path, json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename.

    Raises `RecordError` where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as reason:
        raise RecordError(f"cannot write {path} ({reason.strerror}); choose another folder with --out") from None


def load(path: Path) -> Record:
    """The record in a file.

    Raises `RecordError` where it is cut short, not a record, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise RecordError(f"{path} is of schema {content['schema']}; this effbench reads schema {SCHEMA}")
        known = {f.name for f in fields(Record)}
        return Record(**{key: value for key, value in content.items() if key in known})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise RecordError(f"{path} is not a whole record; delete it and run again to measure it anew") from None


def load_all(folder: Path) -> tuple[list[Record], list[RecordError]]:
    """All readable records of a folder, dense first, and one error for each that is not.

    Raises `RecordError` where there are no records at all.
    """
    files = sorted((folder / "records").glob("*.json")) if folder.is_dir() else []
    if not files:
        raise RecordError(f"{folder} holds no records; give a folder that `effbench run` wrote")
    records, errors = [], []
    for path in files:
        try:
            records.append(load(path))
        except RecordError as error:
            errors.append(error)
    order = _order(folder)
    records.sort(key=lambda r: (r.pipeline != "dense", order.get(r.pipeline, len(order)), r.pipeline, r.seed))
    return records, errors


def _order(folder: Path) -> dict[str, int]:
    """The order in which the pipelines were asked for, where the folder says so."""
    try:
        asked: Sequence[str] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["techniques"]
    except (OSError, json.JSONDecodeError, KeyError):
        return {}
    return {pipeline: place for place, pipeline in enumerate(asked)}


@cache
def code_digest() -> str:
    """A fingerprint of the code that measures: rows measured by other code are not mixed with these."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in (root, *(root.parent / name for name in ("techniques", "tasks"))):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    for entry in registry.entries().values():
        found = find_spec(entry.module) if entry.path is None else None  # another package's technique
        if found and found.origin:
            digest.update(Path(found.origin).read_bytes())
    return digest.hexdigest()[:12]


def inputs(model: str, *texts: str | None) -> dict[str, str]:
    """Fingerprints of what a run reads beside its settings: code, weights and texts,
    which may be folders. The same ones, the same rows."""
    base = model.partition("@")[0]
    folder = reference.folder(base) if base in reference.NAMES else Path(model).expanduser()
    parts = files(folder) if folder.is_dir() else []
    weights = [path for path in parts if path.suffix == ".safetensors"]
    rest = [path for path in parts if path.suffix in BESIDE_WEIGHTS]
    given = [path for text in texts if text for path in files(Path(text))]
    return {"code": code_digest(), "weights": digest(weights), "config": digest(rest), "texts": digest(given)}


def files(path: Path) -> list[Path]:
    """A file, or all those in a folder."""
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def digest(paths: Sequence[Path]) -> str:
    """By content; by size and time of change where a file is too large to be read each time."""
    digest = hashlib.sha256()
    for path in paths:
        about = path.stat()
        small = about.st_size < 2**28
        digest.update(path.read_bytes() if small else f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


@cache
def provenance() -> dict[str, Any]:
    """What ran: commit, packages, machine."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "effbench", "techniques", "tasks")),
        "code": code_digest(),
        "effbench": version("effbench"),
        "python": platform.python_version(),
        "packages": packages,
    }


def _git(*words: str) -> str:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()
