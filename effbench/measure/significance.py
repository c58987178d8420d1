"""What may be claimed: tests, corrected for how many there are, ranks that leave ties, and what could have been seen.

A claim is made at `LEVEL` for all the rows of a table together: of a hundred tables in which nothing differs, one has
a false claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from effbench.measure.statistics import student

LEVEL = 0.01
"""The chance of any false claim in a table."""
POWER = 0.8
"""The chance with which the smallest detectable effect would have been claimed."""


def mcnemar(gained: Any, lost: Any) -> Any:
    """The two-sided p of so many answers turning right and wrong by chance alone.

    McNemar's test in its exact form (Liddell 1983): which way an answer turned is a fair coin.
    """
    from scipy.special import bdtr

    fewer, turned = np.minimum(gained, lost), np.add(gained, lost)
    p = np.minimum(1.0, 2 * bdtr(fewer, turned, 0.5))
    p = np.where(turned == 0, 1.0, p)
    return float(p) if np.ndim(p) == 0 else p


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Each p as it is after so many tests (Holm 1979, Scand. J. Statist. 6:65); NaN is no test and stays."""
    tested = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    adjusted, least = dict(p), 0.0
    for place, (value, name) in enumerate(tested):
        least = max(least, min(1.0, value * (len(tested) - place)))
        adjusted[name] = least
    return adjusted


def detectable(stderr: float, freedom: float, tests: int = 1) -> float:
    """The smallest difference that would have been claimed with the chance `POWER`.

    `stderr` is that of the difference and `freedom` its degrees of freedom; `tests` share the level.
    """
    return (student(1 - LEVEL / max(tests, 1) / 2, freedom) + student(POWER, freedom)) * stderr


def turns_needed(tests: int = 1) -> int:
    """How many answers have to turn, all of them one way, before McNemar's test can claim anything."""
    return math.ceil(1 + math.log2(max(tests, 1) / LEVEL))


def ranks(names: Sequence[int], is_better: Callable[[int, int], bool]) -> dict[int, tuple[int, bool]]:
    """The rank of each row, by number, and whether it shares it.

    A rank is one more than the number of rows that are better, as `is_better(one, other)` claims. Rows of which
    neither is better may still differ in rank, where a third is told apart from only one of them.
    """
    found = {name: 1 + sum(is_better(other, name) for other in names if other != name) for name in names}
    numbers = list(found.values())
    return {name: (rank, numbers.count(rank) > 1) for name, rank in found.items()}
