"""Estimates with their uncertainty, from raw samples. Each works on one data set, and on many along the first axes.

interval by     for                                                     source
`over_blocks`   ratios of sums over documents                           Efron & Tibshirani 1993, 12.5 (studentized)
`over_rounds`   logarithms of times of two that are timed in turn       Tukey & McLaughlin 1963, Sankhya A 25:331
`over_items`    differences of paired right and wrong answers           the same, 13.3 (percentile), by task
`of_quantile`   quantiles of tokens that come in documents              Woodruff 1952, JASA 47:635

Resampling is seeded: the same samples give the same interval. `effbench.measure.significance` makes claims of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 1999
"""Resamples of a bootstrap; with 1999 the 2.5 % and 97.5 % points are order statistics."""
TAIL = 0.025
"""What a 95 % interval leaves out at each end."""
NORMAL = 1.959964
"""The same of the normal distribution, in standard errors."""
TRIMMED = 0.2
"""Share of the rounds left out at each end: what hits one of two that are timed in turn is large and rare."""
CELLS = 2**22
"""The most numbers of a resampling matrix that are made at once."""


class Estimate(NamedTuple):
    """A figure, its standard error, the ends of its 95 % interval, and the two-sided p of there being nothing.

    NaN where too few samples say nothing.
    """

    value: Any
    stderr: Any
    low: Any
    high: Any
    p: Any = math.nan


def over_blocks(sums: ArrayLike, sizes: ArrayLike | None = None) -> Estimate:
    """The sum of `sums` (..., blocks) for each unit of `sizes` (the same shape, or (blocks,); ones if left out).

    A ratio estimator (Cochran 1977, Sampling Techniques, 6.4) with a studentized bootstrap over whole blocks, so
    tokens of one document may depend on each other as they like. Paired samples are given as their differences.
    """
    values = np.asarray(sums, float)
    weights = np.broadcast_to(1.0 if sizes is None else np.asarray(sizes, float), values.shape)
    count, total = values.shape[-1], weights.sum(-1)
    ratio = values.sum(-1) / total
    if count < 2:
        return _estimate(ratio, *[np.full_like(ratio, math.nan)] * 4)
    rest = values - ratio[..., None] * weights
    stderr = np.sqrt((rest**2).sum(-1) * count / (count - 1)) / total
    # the moments of `rest` are all that a resample's ratio and its own error need
    moments = np.stack([rest, weights, rest**2, rest * weights, weights**2], -2)
    drawn = np.concatenate([moments @ times.T for times in _resamples(count)], -1)
    shift, size, squares, crossed, sizes_squared = np.moveaxis(drawn, -2, 0)
    moved = shift / size
    spread = np.sqrt(np.maximum(squares - 2 * moved * crossed + moved**2 * sizes_squared, 0) * count / (count - 1))
    # a resample of blocks that are all alike has no error of its own, and says nothing
    some = spread > 1e-9 * np.sqrt((rest**2).sum(-1))[..., None]
    studentized = np.where(some, shift / np.where(some, spread, 1.0), 0.0)
    # Student's t holds for heavy tails, the bootstrap for skewed ones: no end is nearer than either of them says
    return _studentized(ratio, stderr, studentized, count - 1, student(1 - TAIL, count - 1))


def over_rounds(values: ArrayLike) -> Estimate:
    """The trimmed mean of `values` (..., rounds), differences of two that are timed in turn.

    Its error is that of Tukey and McLaughlin, from the winsorized variance, with a studentized bootstrap as Wilcox
    (2012, Introduction to Robust Estimation, 4.4.5) has it. Where noise is normal little is lost against the mean;
    where a round in ten is hit by something else, the mean's error is several times as large.
    """
    given = np.asarray(values, float)
    count = given.shape[-1]
    middle, stderr = trimmed_mean(given)
    if count < 2:
        return _estimate(middle, *[np.full_like(middle, math.nan)] * 4)
    moved, spread = trimmed_mean(given[..., np.random.default_rng(count).integers(0, count, (DRAWS, count))])
    some = spread > 1e-9 * np.abs(given - middle[..., None]).max(-1)[..., None]
    studentized = np.where(some, (moved - middle[..., None]) / np.where(some, spread, 1.0), 0.0)
    return _studentized(middle, stderr, studentized, freedom_of_rounds(count))


def trimmed_mean(values: ArrayLike) -> tuple[Any, Any]:
    """The mean of `values` (..., rounds) without the `TRIMMED` share at each end, and its standard error."""
    ordered = np.sort(np.asarray(values, float), -1)
    count = ordered.shape[-1]
    cut = int(TRIMMED * count)
    kept = ordered[..., cut : count - cut]
    # the winsorized variance: those left out count as the nearest one kept
    mean = (kept.sum(-1) + cut * (kept[..., 0] + kept[..., -1])) / count
    from_mean = (kept - mean[..., None]) ** 2
    squares = from_mean.sum(-1) + cut * (from_mean[..., 0] + from_mean[..., -1])
    return kept.mean(-1), np.sqrt(squares / max(count - 1, 1) / count) / (1 - 2 * cut / count)


def freedom_of_rounds(count: int) -> int:
    """Degrees of freedom of the error of so many rounds: of those that are kept."""
    return count - 2 * int(TRIMMED * count) - 1


def _studentized(value: Any, stderr: Any, resampled: Any, freedom: int, floor: float = 0.0) -> Estimate:
    """The interval of a value, from its error and (value of a resample - value) / error of a resample, (..., draws).

    No end is nearer than `floor` errors. p is that of Student's t, stretched to the bootstrap's tail, so that it is
    below 5 % where the interval leaves 0 out.
    """
    below, above = np.quantile(resampled, [TAIL, 1 - TAIL], axis=-1)
    below, above = np.minimum(below, -floor), np.maximum(above, floor)
    stretched = stderr * np.where(value > 0, above, -below) / student(1 - TAIL, freedom)
    return _estimate(
        value, stderr, value - above * stderr, value - below * stderr, p_of_student(value, stretched, freedom)
    )


def p_of_student(value: Any, stderr: Any, freedom: float) -> Any:
    """The two-sided p of so many standard errors; without any error whatever is not 0 is certain."""
    from scipy.special import stdtr

    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stdtr(freedom, -np.abs(np.divide(value, stderr)))
    p = np.where(np.asarray(stderr) > 0, p, np.where(np.asarray(value) == 0, 1.0, 0.0))
    return float(p) if p.ndim == 0 else p


def _estimate(*parts: Any) -> Estimate:
    """Floats where there is one data set."""
    return Estimate(*(float(part) if np.ndim(part) == 0 else part for part in parts))


def over_items(gained: ArrayLike, lost: ArrayLike, items: ArrayLike) -> Estimate:
    """The mean over tasks of (gained - lost) / items, each of shape (..., tasks): answers that turned right and wrong.

    Items are drawn anew within each task, with both of their answers.
    """
    right, wrong = np.asarray(gained, float), np.asarray(lost, float)
    count = np.broadcast_to(np.asarray(items, float), right.shape)
    value = ((right - wrong) / count).mean(-1)
    spread = (right + wrong) / count - ((right - wrong) / count) ** 2
    stderr = np.sqrt((spread / np.maximum(count - 1, 1)).sum(-1)) / right.shape[-1]
    shares = np.stack([right / count, wrong / count, np.maximum(1 - (right + wrong) / count, 0)], -1)
    drawn = np.random.default_rng(0).multinomial(count.astype(np.int64), shares, (DRAWS, *right.shape))
    moved = ((drawn[..., 0] - drawn[..., 1]) / count).mean(-1)
    low, high = np.quantile(moved, [TAIL, 1 - TAIL], axis=0)
    # where few answers turn the bootstrap is too narrow on one side, and the normal interval on the other
    margin = NORMAL * stderr
    return _estimate(value, stderr, np.minimum(low, value - margin), np.maximum(high, value + margin))


def of_quantile(
    share: float, below: ArrayLike, tokens: ArrayLike, grid: Sequence[float], values: ArrayLike
) -> Estimate:
    """The quantile `share` of values that come in documents, from what a record keeps of them.

    below: how many of each document's values do not pass the quantile, (..., documents); tokens: how many it has;
    values: the quantiles of all values at the shares in `grid`, (..., grid). The error of the share itself, as a
    ratio over documents, is carried over to the values by their own distribution. An end outside the grid is NaN.
    """
    counted, sizes, known = np.asarray(below, float), np.asarray(tokens, float), np.asarray(values, float)
    sizes = np.broadcast_to(sizes, counted.shape)
    count, total = counted.shape[-1], sizes.sum(-1)
    found = counted.sum(-1) / total
    rest = counted - found[..., None] * sizes
    stderr = np.sqrt((rest**2).sum(-1) * count / max(count - 1, 1)) / total
    # on the scale of log odds an interval near 0 or 1 is as lopsided as the share's own distribution
    odds, step = math.log(share / (1 - share)), student(1 - TAIL, max(count - 1, 1)) * stderr / (share * (1 - share))
    ends = [1 / (1 + np.exp(-(odds + sign * step))) for sign in (0, -1, 1)]
    middle, low, high = (_interpolated(end, grid, known) for end in ends)
    nothing = np.full_like(middle, math.nan)
    return _estimate(middle, nothing, *((low, high) if count > 1 else (nothing, nothing)))


def _interpolated(shares: np.ndarray, grid: Sequence[float], values: np.ndarray) -> np.ndarray:
    """The quantiles at `shares` (...), between those at `grid`; NaN outside."""
    flat = values.reshape(-1, len(grid))
    wanted = np.broadcast_to(np.asarray(shares), values.shape[:-1]).reshape(-1)
    found = [np.interp(one, grid, row, math.nan, math.nan) for one, row in zip(wanted, flat, strict=True)]
    return np.array(found).reshape(values.shape[:-1])


@lru_cache(maxsize=8)
def _kept(count: int) -> tuple[np.ndarray, ...]:
    return tuple(_drawn(count))


def _resamples(count: int) -> Any:
    """How often each of `count` blocks is drawn in each resample, (draws, count), in pieces that fit memory."""
    return _kept(count) if count * DRAWS <= CELLS else _drawn(count)


def _drawn(count: int) -> Any:
    rng, left = np.random.default_rng(count), DRAWS
    while left:
        draws = min(left, max(1, CELLS // count))
        rows = rng.integers(0, count, (draws, count)) + np.arange(draws)[:, None] * count
        yield np.bincount(rows.ravel(), minlength=draws * count).reshape(draws, count).astype(float)
        left -= draws


def student(share: float, freedom: float) -> float:
    """The quantile `share` of Student's t."""
    from scipy.special import stdtrit  # scipy.stats has the same quantile and takes a second to import

    return float(stdtrit(freedom, share))


def paired_difference(candidate: ArrayLike, baseline: ArrayLike, weights: ArrayLike) -> tuple[float, float]:
    """The difference per unit of weight between paired sums, and its standard error.

    `candidate` and `baseline` are sums over the same units (nats over the tokens of each window), `weights` the
    units' sizes (tokens).
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
    """baseline / candidate over rounds in turn, with its 95 % interval.

    What slows the machine for a round slows both and cancels.
    """
    found = over_rounds(np.log(np.asarray(baseline, float)) - np.log(np.asarray(candidate, float)))
    return math.exp(found.value), math.exp(found.low), math.exp(found.high)
