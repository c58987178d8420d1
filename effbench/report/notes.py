"""The words around a table: what was measured and where, why a dash is a dash, and what the figures do not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effbench.measure.derived import Row
from effbench.protocols import DOCUMENT, label
from effbench.report.table import DASH, Table, View


def heading(rows: Sequence[Row]) -> str:
    """Suite, model, dtype and device of the rows."""
    record = rows[0].record
    settings = record.settings
    threads = settings.get("threads")
    parts = [record.suite, record.model.rstrip("/").rpartition("/")[2], settings.get("dtype"), settings.get("device")]
    if threads:
        parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
    return " · ".join(str(part) for part in parts if part)


def conditions(rows: Sequence[Row]) -> list[str]:
    """What was measured, on what machine."""
    row = next((row for row in rows if row.record.status == "ok"), None)
    if row is None:
        return []
    record, settings = row.record, row.record.settings
    said = []
    if "tokens" in record.samples:
        tokens = record.samples["tokens"]
        said.append(f"text: {sum(tokens):,.0f} tokens in {len(tokens):,} windows{_protocols(rows)}")
    tasks = [items for name, items in record.samples.items() if name.startswith("correct/")]
    if tasks:
        chance = record.values.get("accuracy_chance")
        guessing = f"; guessing gives {chance:.3f}" if chance is not None else ""
        plural = "s" if len(tasks) > 1 else ""
        said.append(f"acc: {sum(map(len, tasks)):,} items of {len(tasks)} task{plural}{guessing}")
    if "decode_seconds" in record.samples:
        prompt, new = settings.get("prompt_tokens"), settings.get("new_tokens")
        counts = [len(row.record.samples.get("decode_seconds", [])) for row in rows]
        rounds = "–".join(str(count) for count in sorted({min(filter(None, counts)), max(counts)}))
        said.append(f"time: {rounds} rounds of {prompt} + {new} tokens, batch {settings.get('batch')}")
    energy = record.provenance.get("energy", {})
    if energy.get("step_seconds"):
        before, after = record.samples.get("idle_watts", [float("nan")] * 2)
        said.append(f"energy: {energy['source']}, idle {before:.1f} W before and {after:.1f} W after")
    found = [" · ".join(said)] if said else []
    return found + [_machine(record.provenance)]


def _protocols(rows: Sequence[Row]) -> str:
    """By whose convention the text is scored, where it is not ours alone."""
    names = sorted({label(row.record) for row in rows if "nll" in row.record.samples})
    if names == [DOCUMENT]:
        return ""
    if len(names) == 1:
        return f" by the protocol {names[0]}"
    return f" in the first row; there are rows of several protocols ({', '.join(names)}), never in one column"


def _machine(provenance: dict[str, Any]) -> str:
    machine = provenance.get("machine") or {}
    said = []
    if machine.get("cpu"):
        said.append(f"{machine['cpu']}, {machine.get('cores', '?')} cores")
    said.extend(machine.get("gpus", []))
    commit = str(provenance.get("commit") or "")[:10]
    code = f"effbench {provenance.get('effbench', '')}".strip()
    if commit:
        code += f" at {commit}{' with changes' if provenance.get('dirty') else ''}"
    said.append(code)
    torch = (provenance.get("packages") or {}).get("torch")
    if torch:
        said.append(f"torch {torch}")
    return "machine: " + " · ".join(said)


def legend(table: Table) -> list[str]:
    """What the signs mean that really stand in this table."""
    cells = [cell for line in table.lines for cell in line.cells]
    names = {view.name for view in table.views}
    said = []
    if any("±" in cell.text for cell in cells):
        said.append("± one standard error (Δnats: per token, above dense, paired over the same windows)")
    if any("[" in cell.text for cell in cells):
        said.append("[ ] 95 % interval (of times: over rounds interleaved with dense)")
    if any(cell.within_noise for cell in cells):
        said.append("~ not told apart from dense (level 0.01 for all rows together)")
    if {"quality_rank", "speed_rank"} & names and any("=" in cell.text for cell in cells):
        said.append("= a rank that rows share")
    if "bits_per_weight" in names and any("(" in cell.text for cell in cells):
        said.append("( ) bits that the options promise")
    if any(line.row.simulated for line in table.lines):
        said.append(
            "simulated: the bytes stored do not keep what the options promise, or it is imitated as said below; "
            "its speed is not ranked"
        )
    return (["; ".join(said)] if said else []) + _remarks(table) + _warnings([line.row for line in table.lines])


def _remarks(table: Table) -> list[str]:
    """What systems say of themselves, those rows together that say the same."""
    grouped: dict[str, list[str]] = {}
    for line in table.lines:
        for kind in ("simulated", "unpacked"):
            for reason in line.row.record.provenance.get(kind, []):
                grouped.setdefault(reason, []).append(line.label)
    return [f"{', '.join(labels)}: {reason}" for reason, labels in grouped.items()]


def _warnings(rows: Sequence[Row]) -> list[str]:
    """What has to be said of single rows, those of whom the same is to be said together."""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        for word, sentence in row.warnings.items():
            grouped.setdefault(f"{word}: {sentence}", []).append(row.record.pipeline)
    return [f"{said} ({', '.join(labels)})" for said, labels in grouped.items()]


def dashes(table: Table) -> list[str]:
    """The reason of every dash, those with the same one together, and of every column that is empty throughout."""
    grouped: dict[str, dict[str, list[str]]] = {}
    fine = [line for line in table.lines if line.cells]
    for line in fine:
        for view, cell in zip(table.views, line.cells, strict=True):
            if cell.text == DASH:
                grouped.setdefault(view.why_missing(line.row), {}).setdefault(view.title, []).append(line.label)
    notes = []
    for reason, columns in grouped.items():
        labels = next(iter(columns.values()))
        where = f" ({', '.join(labels)})" if len(labels) < len(fine) else ""
        notes.append(f"{DASH} {', '.join(columns)}: {reason}{where}")
    return notes + _empty(table.empty, [line.row for line in fine])


def _empty(views: Sequence[View], rows: Sequence[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for view in views if rows else ():
        reasons.setdefault(view.why_missing(rows[0]), []).append(view.title)
    said = [f"{', '.join(titles)} {DASH} {reason}" for reason, titles in reasons.items()]
    return ["not measured: " + "; ".join(said)] if said else []


LIMITS = (
    "These figures hold for this model, text, dtype, batch and machine. Rows whose intervals overlap are not ranked; "
    "a larger model, another batch or other kernels can turn an order of speed round."
)
"""What no column can say."""
