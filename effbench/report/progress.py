"""What a run says while it runs: bars with the time left on a terminal, elsewhere one plain line for each row."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from effbench.columns import BY_NAME
from effbench.results import Record

SHOWN = ("perplexity", "accuracy", "stored_bytes")
"""What is told of a row as soon as it is there; the table at the end has the rest."""


class PlainProgress:
    """One line for each finished row, for logs. `out` is the run's folder, known from `start` on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.out: Path | None = None

    def start(self, total: int, out: Path) -> None:
        """Remember the folder."""
        self.out = out

    def step(self, text: str) -> None:
        """Nothing: a log is read for rows."""

    def row(self, record: Record) -> None:
        """Print the row's line."""
        self.console.print(summary(record), highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is left open. May be called twice, also after a run was broken off."""


class BarProgress(PlainProgress):
    """A bar over the steps of the run, with the time passed and left; finished rows scroll by above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
        )

    def start(self, total: int, out: Path) -> None:
        """Show the bar."""
        super().start(total, out)
        if total:
            self._task = self._bars.add_task("starting", total=total)
            self._bars.start()

    def step(self, text: str) -> None:
        """Move the bar on."""
        self._bars.update(self._task, advance=1, description=text if len(text) <= 48 else f"{text[:47]}…")

    def stop(self) -> None:
        """Take the bar away."""
        self._bars.stop()


def progress_for(console: Console) -> PlainProgress:
    """Bars on a terminal, plain lines elsewhere."""
    return BarProgress(console) if console.is_terminal else PlainProgress(console)


def summary(record: Record) -> Text:
    """A finished row in one line."""
    if record.status != "ok":
        status = record.status.replace("_", " ")
        reason = record.reason or ""
        text = reason if status in reason else f"{status}: {reason}"
        return Text.assemble((record.pipeline, "bold"), f"  {text}", style="yellow" if status == "unfit" else "red")
    figures = []
    for name in SHOWN:
        value = record.values.get(name)
        if value is not None:
            figures.append(f"{BY_NAME[name].title or name} {BY_NAME[name].text(value)}")
    return Text.assemble((record.pipeline, "bold"), f"  {' · '.join(figures)}")
