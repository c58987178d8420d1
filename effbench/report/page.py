"""One HTML page that needs nothing else: the table, sortable, and quality against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from effbench.columns import BY_NAME
from effbench.errors import RecordError
from effbench.measure.derived import Row
from effbench.report import notes
from effbench.report.chart import scatter
from effbench.report.table import Cell, Line, Table, build


def page(rows: Sequence[Row]) -> str:
    """The whole document as text."""
    table = build(rows)
    said = [*notes.conditions(rows), *notes.legend(table), *notes.dashes(table), notes.LIMITS]
    chart = scatter(rows)
    template = Template(files("effbench.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(notes.heading(rows)),
        head=_head(table),
        body="\n".join(_line(line, len(table.views)) for line in table.lines),
        chart=f"<h2>What is kept, for how many bytes</h2>\n<figure>\n{chart}\n</figure>" if chart else "",
        notes="\n".join(f"<li>{escape(note)}</li>" for note in said),
    )


def write(rows: Sequence[Row], path: Path) -> None:
    """The document into a file; raises `RecordError` where that cannot be written."""
    try:
        path.write_text(page(rows), encoding="utf-8")
    except OSError as reason:
        raise RecordError(f"cannot write {path} ({reason.strerror}); choose another file with --html") from None


def _head(table: Table) -> str:
    heads = ['<th class="text"><button>pipeline</button></th>']
    for view, unit in zip(table.views, table.units, strict=True):
        meaning = escape(BY_NAME[view.name].meaning, quote=True)
        heads.append(f'<th title="{meaning}"><button>{escape(view.title)}<small>{escape(unit)}</small></button></th>')
    return "".join(heads)


def _line(line: Line, columns: int) -> str:
    record = line.row.record
    label = f"<code>{escape(line.label).replace('+', '<wbr>+')}</code>"
    if line.row.simulated:
        label += ' <span class="badge">simulated</span>'
    first = f'<th scope="row" class="text">{label}</th>'
    if line.reason:
        reason = f'<td class="text" colspan="{columns}">{escape(line.reason)}</td>'
        return f'<tr class="{record.status}">{first}{reason}</tr>'
    cells = [_cell(cell) for cell in line.cells]
    kind = ' class="dense"' if record.pipeline == "dense" else ""
    return f"<tr{kind}>{first}{''.join(cells)}</tr>"


def _cell(cell: Cell) -> str:
    kind, sign = (" class=noise", "~") if cell.within_noise else ("", "")
    value = "" if cell.value is None else repr(cell.value)
    return f'<td{kind} data-value="{value}">{escape(cell.text)}{sign}</td>'
