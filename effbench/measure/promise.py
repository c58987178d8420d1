"""What the options of a pipeline promise, and whether what was measured keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from effbench.results import Record

OPTIONS = ("bits", "sparsity", "pattern", "keep", "rank")
"""Options that speak of weights."""
BITS = {"float32": 32.0, "fp32": 32.0}
"""Bits of a dense weight in a run's dtype, where they are not 16."""


def nominal(techniques: Iterable[Any]) -> dict[str, float]:
    """What the options say, by column; of two techniques that say the same thing the later one counts.

    Of a cache technique its bits, and how many tokens it keeps: a budget, or sinks and window.
    """
    found: dict[str, float] = {}
    for technique in techniques:
        options = {f.name: getattr(technique, f.name) for f in fields(technique)}
        if ".kv_cache." in type(technique).__module__:
            kept = options.get("budget") or (options.get("sinks") or 0) + (options.get("window") or 0)
            said = {"nominal_cache_bits": options.get("bits"), "nominal_cache_tokens": kept or None}
        else:
            said = {f"nominal_{name}": options.get(name) for name in OPTIONS}
            pattern = said.pop("nominal_pattern")
            if isinstance(pattern, str) and ":" in pattern:
                zeros, run = (int(part) for part in pattern.split(":"))
                said["nominal_sparsity"] = zeros / run
        found |= {name: float(value) for name, value in said.items() if isinstance(value, int | float) and value}
    return found


def is_simulated(record: Record, dense: Record | None = None) -> bool:
    """Whether it imitates what its options ask for, or what is stored is not what they promise, of the weights or of
    the cache beside dense."""
    if record.provenance.get("simulated"):
        return True
    return _weights_simulated(record) or (dense is not None and _cache_simulated(record, dense))


def _weights_simulated(record: Record) -> bool:
    """Whether the realised bits are nearer to those of the dense weights, or to those that the pipeline would promise
    without one of its techniques, than to those that it promises."""
    promised = record.values.get("promised_bits_per_weight")
    dense_bits = BITS.get(str(record.settings.get("dtype")), 16.0)
    realised = record.values.get("bits_per_weight")
    if realised is None and record.values.get("compressed_share") == 0:
        realised = dense_bits
    if promised is None or realised is None:
        return False
    less = [dense_bits, *record.samples.get("promised_bits_without_one", [])]
    return any(abs(realised - bits) < abs(realised - promised) for bits in less if bits > promised)


def _cache_simulated(record: Record, dense: Record) -> bool:
    """Whether the filled cache is nearer to the dense one than to what its bits and tokens promise."""
    full, held = dense.values.get("cache_bytes_per_token"), record.values.get("cache_bytes_per_token")
    fed, own = record.samples.get("cache_tokens"), record.samples.get("cache_bytes")
    if own and fed:
        held = own[0] / fed[0]  # what a draft keeps is not of this promise
    bits, kept = record.values.get("nominal_cache_bits"), record.values.get("nominal_cache_tokens")
    if not full or held is None or (bits is None and kept is None):
        return False
    share = min(1.0, kept / fed[0]) if kept and fed else 1.0
    promised = full * share * (bits / BITS.get(str(record.settings.get("dtype")), 16.0) if bits else 1.0)
    return promised < full and abs(held - full) < abs(held - promised)
