"""How near a row comes to what its machine can do, and how long it would take without noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from effbench.measure.limits import Limits, Work
from effbench.results import Record

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.technique import System

WORK = ("decode_bytes_per_token", "decode_operations_per_token")
"""The columns of what is counted."""

SHARES = {
    "prefill_roofline_share": ("prefill", "prefill_seconds"),
    "decode_roofline_share": ("decode", "decode_seconds_per_token"),
}
"""Each share, what work it is about, and the column of its time."""


def shares(record: Record) -> tuple[dict[str, float | None], dict[str, str]]:
    """The least time for the counted work on this machine over the measured time, by column; reasons for none."""
    if WORK[0] not in record.values:
        return {}, {}
    values: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    work, limits = record.provenance.get("work"), record.provenance.get("limits")
    for name, (stage, column) in SHARES.items():
        seconds = record.values.get(column)
        values[name] = None
        if seconds is None:
            missing[name] = record.missing.get(column, "not timed")
        elif not work:
            missing[name] = record.missing[WORK[0]]
        elif not limits:
            missing[name] = "the machine's limits were not measured (effbench doctor --measure does, once)"
        else:
            values[name] = Limits.of(limits).least_seconds(Work(**work[stage])) / seconds
    return values, missing


def idealized(record: Record, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds of a request without noise: prefill from the row's table, then its slope for each token after the first.

    Between two lengths of the table the line through them counts, beyond them that of the two nearest (Narayanan et
    al. 2023, Cheaply Estimating Inference Efficiency Metrics for Autoregressive Transformer Models, idealized runtime).
    Raises `KeyError` where the row was not timed.
    """
    lengths, seconds = record.samples["idealized_prompt_tokens"], record.samples["idealized_prefill_seconds"]
    return _line(prompt_tokens, lengths, seconds) + (new_tokens - 1) * record.samples["idealized_slope"][0]


def measure(record: Record, system: System, prompt: Tensor, new_tokens: int, limits: Limits | None) -> None:
    """Put the work, the limits it is held against, and the prefill table and the decode slope into a timed row.

    `prompt` is (batch, tokens).
    """
    from effbench.measure.speed import ideal
    from effbench.measure.work import count

    try:
        prefill, decode = count(system, prompt, new_tokens)
    except (RuntimeError, NotImplementedError, TypeError) as reason:  # a kernel that cannot be looked at
        why = f"its work could not be counted ({str(reason).partition(chr(10))[0]})"
        for name in WORK:
            record.put(name, None, why)
    else:
        record.provenance["work"] = {"prefill": asdict(prefill), "decode": asdict(decode)}
        record.put("decode_bytes_per_token", decode.bytes)
        record.put("decode_operations_per_token", sum(decode.operations.values()))
    record.provenance["limits"] = asdict(limits) if limits else None
    table, slope = ideal(system, prompt, new_tokens)
    record.samples["idealized_prompt_tokens"] = list(table)
    record.samples["idealized_prefill_seconds"] = list(table.values())
    record.samples["idealized_slope"] = [slope]
    record.put("idealized_seconds", idealized(record, prompt.shape[1], new_tokens))


def _line(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    if len(places) == 1:
        return values[0]
    after = min(max(1, next((n for n, place in enumerate(places) if place >= at), len(places) - 1)), len(places) - 1)
    x, y = places[after - 1 : after + 1], values[after - 1 : after + 1]
    return y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0])
