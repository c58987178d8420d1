"""The options of the command line: what each is called, its unit, its default, and a line about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _option(text: str, metavar: str | None = None) -> Any:
    return typer.Option(metavar=metavar, help=text.replace("[", "\\["))  # rich would take [default: 1] for a style


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text.replace("[", "\\["), show_default=False)


Model = Annotated[str, _argument("MODEL", "Embedded model, folder, or hub id.")]
MaybeModel = Annotated[str | None, _argument("MODEL", "Embedded model, folder, or hub id. [default: ref-1m]")]
Pipeline = Annotated[str, _argument("PIPELINE", "As rtn:bits=4 or wanda+rtn.")]
Technique = Annotated[str, _argument("TECHNIQUE", "Its name.")]
Kind = Annotated[Literal["techniques", "tasks", "models", "suites"], typer.Argument(help="What to list.")]
Folder = Annotated[Path, _argument("DIR", "Folder that `effbench run` wrote.")]
Old = Annotated[Path, _argument("OLD", "Folder of the earlier records.")]
New = Annotated[Path, _argument("NEW", "Folder of the later ones.")]

Techniques = Annotated[
    list[str] | None, _option("Pipelines, as rtn:bits=4 or wanda+rtn. [default: those of the suite]", "P ...")
]
Suite = Annotated[str | None, _option("Suite by name or TOML file. [default: reference]", "FILE")]
Tasks = Annotated[list[str] | None, _option("Tasks and groups of lm-eval. [default: the model's own]", "T,...")]
NumFewshot = Annotated[int | None, _option("Examples before each item. [default: the task's own number]", "N")]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Ask tasks as turns of a chat.")]
TaskData = Annotated[
    Path | None, _option("Folder with the items of tasks, as on the hub or T.jsonl. [default: the hub]", "DIR")
]
Text = Annotated[str | None, _option("Text to evaluate, .txt or .jsonl. [default: the model's own]", "FILE")]
Calibration = Annotated[
    str | None, _option("Text that techniques may read. [default: the first quarter of --text]", "FILE")
]
Protocol = Annotated[
    Literal["document", "gptq", "lm-eval", "llama.cpp"] | None,
    _option("Whose convention of perplexity the text is cut by. [default: document, ours]"),
]
Window = Annotated[int | None, _option("Tokens of a window of text. [default: the protocol's]", "N")]
Limit = Annotated[int | None, _option("Items of each task and windows of text, at most. [default: all]", "N")]
Device = Annotated[Literal["auto", "cpu", "cuda"] | None, _option("Where to run. [default: auto]")]
Dtype = Annotated[Literal["bfloat16", "float16", "float32"] | None, _option("Of the dense model. [default: bfloat16]")]
Threads = Annotated[int | None, _option("Threads. [default: the cores there are]", "N")]
Batch = Annotated[int | None, _option("Sequences timed at once. [default: 1]", "N")]
PromptTokens = Annotated[int | None, _option("Tokens of a timed prompt. [default: 128]", "N")]
NewTokens = Annotated[int | None, _option("Tokens timed after it. [default: 48]", "N")]
Rounds = Annotated[int | None, _option("Timed rounds, interleaved with dense. [default: 16]", "N")]
Conditions = Annotated[str | None, _option("Further batches and prompts timed, as 8x128,1x512.", "BxT,...")]
DenseRuns = Annotated[int | None, _option("Dense processes timed, for the noise floor. [default: 6]", "N")]
Timeout = Annotated[int | None, _option("Seconds for a step of one row. [default: 1800]", "SECONDS")]
Seed = Annotated[int | None, _option("Seed of everything random. [default: 0]", "N")]
Out = Annotated[Path | None, _option("Folder of the records. [default: one under runs/]", "DIR")]
Save = Annotated[Path, typer.Option(metavar="DIR", help="New folder for the result.", show_default=False)]
Html = Annotated[Path | None, _option("Also write the table as one HTML page.", "FILE")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run any code.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a model's folder brings.")]

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
Csv = Annotated[bool, typer.Option("--csv", help="As CSV.")]
Details = Annotated[bool, typer.Option("--details", help="Intervals, tests, ranks; promises beside what was realised.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="As a GitHub Markdown table.")]
Measure = Annotated[bool, typer.Option("--measure", help="Measure the machine's limits and keep them (seconds).")]
Speed = Annotated[float, _option("Change of a ratio of times that counts.", "SHARE")]
Memory = Annotated[float, _option("Growth of a peak that counts.", "SHARE")]
Nats = Annotated[float, _option("Change in nats per token that counts.", "NATS")]
Errors = Annotated[float, _option("Standard errors that a change has to pass.", "N")]


def spread(words: list[str]) -> list[str]:
    """The words with `--techniques a b` written as `--techniques a --techniques b`, up to the next option."""
    found: list[str] = []
    several = False
    for place, word in enumerate(words):
        if word.startswith("-"):
            several = word.partition("=")[0] == "--techniques"
        elif several and words[place - 1] != "--techniques":
            found.append("--techniques")
        found.append(word)
    return found
