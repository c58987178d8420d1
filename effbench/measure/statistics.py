"""Intervals and paired differences, from raw samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def paired_difference(
    candidate: Sequence[float], baseline: Sequence[float], weights: Sequence[float]
) -> tuple[float, float]:
    """The difference per unit of weight between paired sums, and its standard error.

    `candidate` and `baseline` are sums over the same units (nats over the tokens of each window), `weights` the
    units' sizes (tokens): a ratio estimator over units (Cochran 1977, Sampling Techniques, 6.4).
    """
    difference = np.asarray(candidate, float) - np.asarray(baseline, float)
    size = np.asarray(weights, float)
    total, count = size.sum(), len(size)
    ratio = difference.sum() / total
    if count < 2:
        return float(ratio), math.nan
    residual = difference - ratio * size
    return float(ratio), float(math.sqrt((residual**2).sum() * count / (count - 1)) / total)


def mean_and_stderr(samples: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    values = np.asarray(samples, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, float, float]:
    """baseline / candidate over interleaved rounds, with its 95 % interval.

    The geometric mean of the rounds' ratios, Student's t over their logarithms: what slows the machine for a round
    slows both and cancels.
    """
    from scipy.special import stdtrit  # scipy.stats has the same quantile and takes a second to import

    logs = np.log(np.asarray(baseline, float)) - np.log(np.asarray(candidate, float))
    centre = float(logs.mean())
    if len(logs) < 2:
        return math.exp(centre), math.nan, math.nan
    margin = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return math.exp(centre), math.exp(centre - margin), math.exp(centre + margin)
