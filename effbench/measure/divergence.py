"""How far a row's next-token distributions are from dense: what a record keeps of it, and the estimates made of that.

A record keeps sums over windows, the quantiles of all tokens on a grid, and how many of each window's tokens do not
pass the two that are shown: a few hundred numbers, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from effbench.measure.statistics import Estimate, of_quantile, over_blocks

QUANTILES = {"kl_to_dense_median": 0.5, "kl_to_dense_p99": 0.99}
GRID = tuple(sorted({k / 100 for k in range(35, 66)} | {k / 1000 for k in range(960, 1001)}))
"""The shares at which the quantiles of all tokens are kept: around those of `QUANTILES`."""
LEAST_TOKENS, LEAST_BLOCKS = 50, 32
"""Fewer tokens beyond a quantile, or fewer windows, give it no interval: it would be too narrow."""


def samples(divergences: Sequence[np.ndarray], agreed: Sequence[int]) -> dict[str, list[float]]:
    """What a record keeps of the divergence of each token, one array for each window, and of the tokens that agree."""
    pooled = np.concatenate(divergences)
    kept: dict[str, list[float]] = {
        "kl": [_short(values.sum()) for values in divergences],
        "agreed": list(map(float, agreed)),
        "compared_tokens": [len(values) for values in divergences],
        "kl_quantiles": [_short(value) for value in np.quantile(pooled, GRID)],
    }
    for name, share in QUANTILES.items():
        point = np.quantile(pooled, share)
        kept[f"below/{name}"] = [int((values <= point).sum()) for values in divergences]
    return kept


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def estimates(kept: Mapping[str, Sequence[float]], documents: Sequence[float] | None = None) -> dict[str, Estimate]:
    """The mean divergence and the share of tokens that agree, with their intervals; its quantiles too, where kept.

    `documents` numbers the document that each window is of; without it each is one.
    """
    tokens = blocks(kept["compared_tokens"], documents)
    there = tokens > 0
    found = {
        "kl_to_dense": over_blocks(blocks(kept["kl"], documents)[there], tokens[there]),
        "top1_agreement": over_blocks(blocks(kept["agreed"], documents)[there], tokens[there]),
    }
    for name, share in QUANTILES.items():
        below = blocks(kept[f"below/{name}"], documents)[there]
        estimate = of_quantile(share, below, tokens[there], GRID, kept["kl_quantiles"])
        few = there.sum() < LEAST_BLOCKS or tokens.sum() * (1 - share) < LEAST_TOKENS
        found[name] = Estimate(*estimate[:2], *(np.nan, np.nan)) if few else estimate
    return found


def blocks(sums: Sequence[float], documents: Sequence[float] | None) -> np.ndarray:
    """The sums over windows as sums over documents."""
    if documents is None:
        return np.asarray(sums, float)
    return np.bincount(np.asarray(documents, int), weights=np.asarray(sums, float))
