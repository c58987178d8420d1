"""Quality against bytes as an inline SVG: what a row keeps of the dense model, and what it stores for that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import cycle

from effbench.columns import BY_NAME
from effbench.measure.derived import Row

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 20, 50
LINE = 13
"""The height of a label."""


def scatter(rows: Sequence[Row]) -> str:
    """An SVG with stored bytes (logarithmic) across and nats per token above dense up; "" where no row has both.

    The dense row is the ringed one. Each mark has a label, and its figures when pointed at.
    """
    points = [(row, row.values.get("stored_bytes"), row.values.get("nll_difference")) for row in rows]
    known = [(row, x, y) for row, x, y in points if x and y is not None]
    if not known:
        return ""
    low, high = min(x for _, x, _ in known), max(x for _, x, _ in known)
    low, high = low / 1.15, high * 1.5
    bottom, top = min(0.0, *(y for *_, y in known)), max(0.01, *(y for *_, y in known)) * 1.08
    height, width = HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT

    def across(value: float) -> float:
        return LEFT + width * math.log(value / low) / math.log(high / low)

    def up(value: float) -> float:
        # the square root spreads what lies close to dense, where most of what is of use lies
        return TOP + height * (1 - math.sqrt(max(value - bottom, 0)) / math.sqrt(top - bottom))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="nats above dense against stored bytes">']
    for value in _ticks(bottom, top):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _sizes(low, high):
        x, (factor, unit) = across(value), BY_NAME["stored_bytes"].scale(value)
        label = f"{value / factor:g} {unit}"
        parts.append(f'<line class="grid" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="{x:.1f}" x2="{x:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="axis" x="{LEFT + width / 2}" y="{HEIGHT - 8}" text-anchor="middle">stored bytes</text>')
    parts.append(
        f'<text class="axis" transform="translate(16 {TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        "nats per token above dense</text>"
    )
    hues = dict(zip(dict.fromkeys(_first(row) for row, *_ in known), cycle(range(8)), strict=False))
    taken = [(across(x) - 7, across(x) + 7, up(y)) for _, x, y in known]
    for row, x, y in sorted(known, key=lambda point: -point[2]):
        parts.append(_mark(row, across(x), up(y), hues[_first(row)], taken))
    return "\n".join([*parts, "</svg>"])


def _first(row: Row) -> str:
    return row.record.pipeline.partition("+")[0].partition(":")[0]


def _mark(row: Row, x: float, y: float, hue: int, taken: list[tuple[float, float, float]]) -> str:
    """One point and its label, as near as it can be without meeting what is `taken` (left, right, middle)."""
    label, dense = row.record.pipeline, row.record.pipeline == "dense"
    label = label if len(label) <= 34 else f"{label[:33]}…"
    length = 6.4 * len(label)
    start = x - 9 - length if x + 9 + length > WIDTH - 4 else x + 9
    shifts = sorted(range(-20, 21), key=lambda shift: (abs(shift), shift))
    places = [y + shift * LINE / 3 for shift in shifts if y + shift * LINE / 3 <= HEIGHT - BOTTOM]
    place = next((place for place in places if _is_free(start, start + length, place, taken)), y)
    taken.append((start, start + length, place))
    figures = ", ".join(
        f"{name.replace('_', ' ')} {BY_NAME[name].text(row.values.get(name))}"
        for name in ("stored_bytes", "nll_difference", "accuracy", "decode_speedup")
        if row.values.get(name) is not None
    )
    kind = "dense" if dense else f"hue{hue}"
    return (
        f'<g class="{kind}"><title>{escape(row.record.pipeline)}: {figures}</title>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if dense else 5}"/>'
        f'<text class="label" x="{start:.1f}" y="{place + 4:.1f}">{escape(label)}</text></g>'
    )


def _is_free(left: float, right: float, middle: float, taken: Sequence[tuple[float, float, float]]) -> bool:
    return all(right < start or end < left or abs(middle - other) >= LINE for start, end, other in taken)


def _ticks(low: float, high: float) -> list[float]:
    """Round values that lie well apart on a square-root axis."""
    step = 10 ** math.floor(math.log10(high))
    found = [0.0]
    for value in (step / 100, step / 10, step / 4, step / 2, step, 2 * step, 3 * step, 5 * step, 8 * step):
        apart = math.sqrt(value / high) - math.sqrt(found[-1] / high)
        if low <= value <= high and apart > 0.08:
            found.append(value)
    return found


def _sizes(low: float, high: float) -> list[float]:
    """Round numbers of bytes between the two."""
    decade = 10 ** math.floor(math.log10(low))
    steps = (1, 2, 5) if high / low < 100 else (1,)
    return [v for k in range(8) for s in steps if low <= (v := s * decade * 10**k) <= high]
