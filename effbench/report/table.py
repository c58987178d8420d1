"""What a table shows, whoever draws it: headings with units, cells as text, notes for all that needs a word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from effbench.columns import BY_NAME, SCALES, decimal
from effbench.measure.derived import Row
from effbench.protocols import TEXT_COLUMNS, label
from effbench.report.frame import why_missing

DASH = "–"


@dataclass(frozen=True)
class View:
    """One column of the table. Where there is too little width, those of the highest `rank` go first.

    error: the column written behind ±. interval: its two ends are written in brackets. beside: the column written
    in parentheses. signed: written with its sign. optional: left out where no row differs from `usual`. of: shown
    only for text scored by this protocol. protocol: the one of its rows, where the table has rows of several.
    """

    name: str
    rank: int
    error: str = ""
    interval: bool = False
    beside: str = ""
    signed: bool = False
    usual: float | None = None
    of: str = ""
    protocol: str = ""

    @property
    def title(self) -> str:
        """What stands above it."""
        column = BY_NAME[self.name]
        title = column.title or column.name.replace("_", " ")
        return f"{title} ({self.protocol})" if self.protocol else title

    def value(self, row: Row) -> float | None:
        """This row's figure; none where its text was scored by another protocol."""
        if self.protocol and label(row.record) != self.protocol:
            return None
        return row.values.get(self.name)

    def why_missing(self, row: Row) -> str:
        """Why there is none."""
        return why_missing(row, f"{self.name} ({self.protocol})" if self.protocol else self.name)


VIEWS = (
    View("perplexity", 2),
    View("nll_difference", 0, error="nll_difference_stderr", signed=True),
    View("word_perplexity", 1, of="lm-eval"),
    View("quality_rank", 8),
    View("accuracy", 3, error="accuracy_stderr"),
    View("kl_to_dense", 7),
    View("top1_agreement", 12),
    View("bits_per_byte", 14),
    View("decode_speedup", 1, interval=True),
    View("speed_rank", 9),
    View("decode_seconds_per_token", 10),
    View("prefill_speedup", 13, interval=True),
    View("decode_roofline_share", 12),
    View("idealized_seconds", 13),
    View("tokens_per_pass", 9, usual=1.0),
    View("stored_bytes", 1),
    View("bits_per_weight", 4, beside="promised_bits_per_weight"),
    View("cache_bytes_per_token", 5),
    View("peak_growth_bytes", 6),
    View("peak_bytes", 15),
    View("peak_device_bytes", 6),
    View("joules_per_token", 6),
    View("cost_seconds", 8),
    View("cost_tokens", 11),
)
DETAILS: dict[str, tuple[View, ...]] = {
    "quality beside dense": (
        View("nll_difference", 0, interval=True, signed=True),
        View("nll_difference_p", 2),
        View("nll_difference_detectable", 3),
        View("quality_rank", 1),
        View("accuracy_difference", 0, interval=True, signed=True),
        View("accuracy_difference_p", 2),
        View("accuracy_difference_detectable", 4),
        View("flips_to_wrong", 1),
        View("flips_to_right", 1),
        View("kl_to_dense", 3, interval=True),
        View("kl_to_dense_median", 6, interval=True),
        View("kl_to_dense_p99", 5, interval=True),
        View("top1_agreement", 4, interval=True),
    ),
    "speed beside dense": (
        View("decode_speedup", 0, interval=True),
        View("decode_speedup_p", 1),
        View("decode_speedup_detectable", 1),
        View("speed_rank", 1),
        View("decode_seconds_per_token", 2),
        View("prefill_speedup", 0, interval=True),
        View("prefill_speedup_p", 2),
        View("prefill_speedup_detectable", 2),
        View("prefill_seconds", 3),
    ),
    "promise and reality": (
        View("nominal_bits", 0),
        View("nominal_sparsity", 0),
        View("nominal_keep", 1),
        View("nominal_rank", 1),
        View("nominal_cache_bits", 1),
        View("nominal_cache_tokens", 1),
        View("bits_per_weight", 0, beside="promised_bits_per_weight"),
        View("stored_bytes", 1),
        View("cache_bytes_per_token", 1),
        View("decode_speedup", 0, interval=True),
        View("speed_rank", 1),
    ),
}
"""The tables of `effbench show --details`."""


@dataclass(frozen=True)
class Cell:
    """A cell as text; `value` is what it is sorted by. `within_noise`: not told apart from dense."""

    text: str
    value: float | None = None
    within_noise: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table: cells, or the reason why there are none."""

    row: Row
    label: str
    cells: tuple[Cell, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The views that have something to show, their units, the lines; `empty` are views in which no row has a value."""

    views: tuple[View, ...]
    units: tuple[str, ...]
    lines: tuple[Line, ...]
    empty: tuple[View, ...] = field(default=())


def build(rows: Sequence[Row], views: Sequence[View] = VIEWS) -> Table:
    """The table of these rows, in their order. Rows that are not `ok` show their reason instead of figures."""
    fine = [row for row in rows if row.record.status == "ok"]
    there = {name for row in fine for name in row.values}  # a column that is newer than the records is none of theirs
    views = [view for view in _by_protocol(fine, views) if view.name in there]
    empty = tuple(view for view in views if all(view.value(row) is None for row in fine))
    shown = [
        view
        for view in views
        if view not in empty and (view.usual is None or any(view.value(row) != view.usual for row in fine))
    ]
    formats = [_Format(view, fine) for view in shown]
    several = len({row.record.seed for row in rows}) > 1
    lines = []
    for row in rows:
        label = f"{row.record.pipeline} (seed {row.record.seed})" if several else row.record.pipeline
        if row in fine:
            lines.append(Line(row, label, tuple(layout.cell(row) for layout in formats)))
        else:
            lines.append(Line(row, label, reason=_reason(row)))
    return Table(tuple(shown), tuple(layout.unit for layout in formats), tuple(lines), empty)


def _by_protocol(rows: Sequence[Row], views: Sequence[View]) -> list[View]:
    """The views that these rows can have; what depends on the text once for each protocol that it was scored by."""
    labels = list(dict.fromkeys(label(row.record) for row in rows if row.values.get("perplexity") is not None))
    found: list[View] = []
    for view in views:
        if view.of and not any(name.startswith(view.of) for name in labels):
            continue
        several = len(labels) > 1 and view.name in TEXT_COLUMNS
        found.extend([replace(view, protocol=name) for name in labels] if several else [view])
    return [view for view in found if view.protocol.startswith(view.of) or not view.protocol]


def _reason(row: Row) -> str:
    status = row.record.status.replace("_", " ")
    if status == "running":
        return "not finished; the command that began it continues it"
    reason = row.record.reason or status
    return reason if status in reason else f"{status}: {reason}"


class _Format:
    """How the values of one view are written: one unit and one number of decimals for all of them."""

    def __init__(self, view: View, rows: Sequence[Row]) -> None:
        self.view, column = view, BY_NAME[view.name]
        values = [abs(value) for row in rows if (value := view.value(row))]
        self.factor, self.unit = column.scale(max(values, default=0.0))
        self.digits = column.digits
        if column.unit in SCALES:
            least, most = (pick(values, default=1.0) / self.factor for pick in (min, max))
            self.digits = min(3, max(0, 1 - math.floor(math.log10(least)), 2 - math.floor(math.log10(most))))
        if self.unit in view.title:
            self.unit = ""

    def cell(self, row: Row) -> Cell:
        """The cell of one row: the value with what belongs to it."""
        view, value = self.view, self.view.value(row)
        if value is None:
            return Cell(DASH)
        text = self._number(value)
        if view.signed and value > 0:
            text = f"+{text}"
        error = row.values.get(view.error)
        if error:
            text += f" ±{self._number(error)}"
        low, high = row.values.get(f"{view.name}_low"), row.values.get(f"{view.name}_high")
        if view.interval and low is not None and high is not None:
            text += f" [{self._number(low)}–{self._number(high)}]"
        if view.name in row.tied:
            text += "="
        beside = row.values.get(view.beside)
        if beside is not None:
            text += f" ({beside:.3g})"
        return Cell(text, value, view.name in row.within_noise)

    def _number(self, value: float) -> str:
        value, least = value / self.factor, 10**-self.digits
        if 0 < abs(value) < least / 2:
            return f"{'-' if value < 0 else ''}<{least:.{self.digits}f}"
        return decimal(value, self.digits) if value else "0"
