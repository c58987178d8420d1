"""Items of lm-eval's tasks from a local folder, under lm-eval's own prompts: only where items come from is replaced.

Looked for are, in this order and each as .parquet, .jsonl, .json, or one of these .gz:

<folder>/<task>.jsonl                              one split; rows as the hub has them, or context, choices and gold
<folder>/<owner>/<dataset>/[<config>/|data/]...    as cloned from the hub; files are named by their split
<folder>/<dataset>/..., <folder>/<task>/...        the same
<folder>/datasets--<owner>--<dataset>/snapshots/*  the hub's own cache
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable
from lm_eval.api.task import ConfigurableTask

from effbench.errors import TaskError

SPLITS = {
    "train": re.compile(r"(^|[-_./])train"),
    "validation": re.compile(r"(^|[-_./])(valid|val|dev)"),
    "test": re.compile(r"(^|[-_./])test"),
}
"""What a file's name says about its split."""
ENDINGS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
LETTERS = "ABCDEFGHIJ"
SENTENCE_END = re.compile(r"[.!?\"')\]]\s+(?=[^.!?]*$)")


@contextmanager
def local(folder: Path | None) -> Iterator[None]:
    """Tasks that are loaded meanwhile get their items from `folder`; with `None` they come from where they say.

    Raises `TaskError` for a task whose items are not there, or cannot be read. Tasks that make their items
    themselves are left alone.
    """
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise TaskError(f"--task-data {folder} is not a folder; give one with a file or folder for each task")
    usual = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        if callable(task.config.custom_dataset):
            usual(task, dataset_kwargs, **options)
        else:
            task.dataset = dataset(folder, task.config)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = usual


def dataset(folder: Path, config: Any) -> DatasetDict:
    """The splits of the task with this lm-eval config. Those that it names and that are not there are empty.

    Raises `TaskError` where none of its items is there.
    """
    name = str(config.task)
    wanted = config.test_split or config.validation_split or config.training_split
    single = next((path for ending in ENDINGS if (path := folder / f"{name}{ending}").is_file()), None)
    found = {wanted: _read([single], name)} if single is not None else _splits(folder, config)
    if wanted not in found or not len(found[wanted]):
        places = ", ".join(str(place) for place in (f"{name}.jsonl", *_homes(Path(), config)))
        raise TaskError(f"--task-data {folder} has no {wanted} items of task {name!r}; looked for {places}")
    for split in (config.training_split, config.validation_split, config.test_split):
        if split and split not in found:
            found[split] = found[wanted].select([])
    return DatasetDict(found)


def _homes(folder: Path, config: Any) -> list[Path]:
    """Where a dataset's files may lie."""
    path = str(config.dataset_path or config.task)
    owner, _, short = path.rpartition("/")
    cached = folder / f"datasets--{owner}--{short}" / "snapshots"
    return [folder / path, folder / short, folder / str(config.task), *sorted(cached.glob("*"))]


def _splits(folder: Path, config: Any) -> dict[str, Dataset]:
    name = str(config.task)
    files = (config.dataset_kwargs or {}).get("data_files")
    for home in dict.fromkeys(home for home in _homes(folder, config) if home.is_dir()):
        if isinstance(files, dict):
            named = {split: sorted(home.glob(str(pattern))) for split, pattern in files.items()}
            found = {split: paths for split, paths in named.items() if paths}
        else:
            found = _by_name(home, config.dataset_name)
        if found:
            return {split: _read(paths, name) for split, paths in found.items()}
    return {}


def _by_name(home: Path, part: str | None) -> dict[str, list[Path]]:
    """The files of each split in a dataset's folder, or in that of the part of it that is asked for."""
    inside = [home / part, home / "data" / part] if part else []
    start = next((place for place in inside if place.is_dir()), home)
    found: dict[str, list[Path]] = {}
    for path in sorted(start.rglob("*")):
        relative = path.relative_to(start).as_posix()
        if not relative.endswith(ENDINGS) or not path.is_file():
            continue
        if part and start == home and part.lower() not in relative.lower():
            continue
        split = next((split for split, pattern in SPLITS.items() if pattern.search(relative.lower())), None)
        if split:
            found.setdefault(split, []).append(path)
    return found


def _read(paths: list[Path], task: str) -> Dataset:
    """The rows of some files, one behind the other.

    Raises `TaskError` where a file cannot be read.
    """
    rows: list[Any] = []
    tables = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                tables.append(pyarrow.parquet.read_table(path))
                continue
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8")
            if text.lstrip().startswith("["):
                rows += json.loads(text)
            else:
                rows += [json.loads(line) for line in text.split("\n") if line.strip()]
        except (OSError, ValueError) as reason:
            raise TaskError(f"{path} cannot be read as items of task {task!r} ({reason})") from None
    if tables:
        import pyarrow

        return Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
    if rows and isinstance(rows[0], dict) and {"context", "choices", "gold"} <= set(rows[0]):
        rows = [_as_on_hub(row, task, f"{paths[0]}, item {number}") for number, row in enumerate(rows, 1)]
    try:
        return Dataset.from_list(rows)
    except (TypeError, AttributeError, ValueError) as reason:
        raise TaskError(f"{paths[0]} holds no items of task {task!r} ({reason})") from None


def _as_on_hub(row: dict[str, Any], task: str, where: str) -> dict[str, Any]:
    """An item of context, choices and gold as the hub has it, so that lm-eval makes the same prompt of it.

    Raises `TaskError` where it is none of this task.
    """
    convert = CONVERTED.get(task)
    if convert is None:
        raise TaskError(
            f"{where}: items of context, choices and gold are understood for {', '.join(CONVERTED)}, and not for "
            f"task {task!r}; give its rows as the hub has them"
        )
    try:
        return convert(row)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as reason:
        raise TaskError(f"{where} is no item of task {task!r} ({type(reason).__name__}: {reason})") from None


def _between(text: str, start: str, end: str) -> str:
    if not (text.startswith(start) and text.endswith(end)):
        raise ValueError(f"its context does not go from {start!r} to {end!r}")
    return text[len(start) : len(text) - len(end)]


def _lettered(row: dict[str, Any]) -> dict[str, Any]:
    labels = list(LETTERS[: len(row["choices"])])
    return {"choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": _between(row["context"], "Question: ", "\nAnswer:"), **_lettered(row)}


def _openbookqa(row: dict[str, Any]) -> dict[str, Any]:
    return {"question_stem": row["context"], **_lettered(row)}


def _piqa(row: dict[str, Any]) -> dict[str, Any]:
    one, other = row["choices"]
    goal = _between(row["context"], "Question: ", "\nAnswer:")
    return {"goal": goal, "sol1": one, "sol2": other, "label": row["gold"]}


def _boolq(row: dict[str, Any]) -> dict[str, Any]:
    if row["choices"] != ["no", "yes"]:
        raise ValueError("its choices are not no and yes")
    passage, found, question = _between(row["context"], "Passage: ", "?").rpartition("\nQuestion: ")
    if not found:
        raise ValueError("its context has no question")
    return {"passage": passage, "question": question, "label": row["gold"]}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    """What follows the last whole sentence is what the endings go on with, which lm-eval starts with a capital."""
    activity, _, context = row["context"].partition(": ")
    whole = re.search(r"[.!?\"')\]:;]$", context)
    cut = None if whole else SENTENCE_END.search(context)
    before, begun = (context[: cut.end()].rstrip(), context[cut.end() :]) if cut else (context, "")
    return {
        "activity_label": activity,
        "ctx_a": before,
        "ctx_b": begun,
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    start = row["context"] + (" " if row["context"] else "")
    one, other = (_between(context, start, "") for context in row["contexts"])
    sentence = f"{start}_ {row['continuation']}"
    return {"sentence": sentence, "option1": one, "option2": other, "answer": str(row["gold"] + 1)}


CONVERTED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "winogrande": _winogrande,
}
"""How an item of context, choices and gold is taken apart, for each task."""
