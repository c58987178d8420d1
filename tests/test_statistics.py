"""Intervals are as wide as they say."""

import numpy as np
import pytest

from effbench.measure.statistics import mean_and_stderr, paired_difference, paired_ratio


def test_paired_difference_removes_what_the_windows_share_and_its_error_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        tokens = rng.integers(50, 500, 60)
        base = tokens * rng.normal(3, 1, 60)
        candidate = base + tokens * rng.normal(0.1, 0.05, 60)
        found.append(paired_difference(candidate, base, tokens))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.1, abs=0.002)
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.12)
    assert errors.mean() < 0.02, "the shared part (1 nat between windows) must cancel"


def test_mean_and_stderr_of_items() -> None:
    mean, error = mean_and_stderr([1, 0, 1, 1])
    assert mean == 0.75 and error == pytest.approx(0.25)


def test_paired_ratio_cancels_a_machine_that_slows_down_and_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        weather = np.exp(rng.normal(0, 0.7, 8))
        dense, candidate = 2 * weather * np.exp(rng.normal(0, 0.05, 8)), weather * np.exp(rng.normal(0, 0.05, 8))
        ratio, low, high = paired_ratio(dense, candidate)
        assert ratio == pytest.approx(2, rel=0.2)
        covered += low < 2 < high
    assert 0.91 < covered / 300 < 0.98
