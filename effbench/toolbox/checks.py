"""Checks of option values, each message ending with what was got."""

from __future__ import annotations

from collections.abc import Sequence


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises `ValueError` unless `value` is among `allowed`."""
    if value not in allowed:
        listed = ", ".join(str(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value}")


def within(name: str, value: float, low: float, high: float = float("inf"), *, open_ends: bool = False) -> None:
    """Raises `ValueError` unless low <= value <= high (low < value < high with `open_ends`)."""
    inside = low < value < high if open_ends else low <= value <= high
    if not inside:
        shown = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{name} must be {'strictly ' if open_ends else ''}{shown}, got {value}")
