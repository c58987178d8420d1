"""Intervals are as wide as they say, on 2,000 data sets each, and claims are false as seldom as they say."""

import numpy as np
import pytest

from effbench.measure import divergence, paired
from effbench.measure.significance import LEVEL, detectable, holm, mcnemar, ranks, turns_needed
from effbench.measure.statistics import (
    Estimate,
    mean_and_stderr,
    of_quantile,
    over_blocks,
    over_items,
    over_rounds,
    p_of_student,
    paired_difference,
    trimmed_mean,
)

SETS = 2000


def covered(found: Estimate, truth: float) -> float:
    return float(np.mean((found.low <= truth) & (truth <= found.high)))


@pytest.mark.parametrize("documents", [32, 64])
@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy tails"])
def test_intervals_over_documents_cover_the_difference_in_nats(kind: str, documents: int) -> None:
    rng = np.random.default_rng(documents)
    tokens = rng.integers(50, 500, (SETS, documents))
    # what a document differs by, and what its tokens add to that; 0.1 on average
    of_document = {
        "normal": lambda: rng.normal(0.1, 0.05, tokens.shape),
        "skewed": lambda: rng.gamma(1, 0.1, tokens.shape),
        "heavy tails": lambda: 0.1 + 0.05 * rng.standard_t(4, tokens.shape),
    }[kind]()
    sums = tokens * of_document + rng.normal(0, 1, tokens.shape) * np.sqrt(tokens)
    assert 0.93 <= covered(over_blocks(sums, tokens), 0.1) <= 0.97


def test_intervals_of_agreement_cover_where_documents_differ_in_it() -> None:
    rng = np.random.default_rng(1)
    agreed = rng.binomial(300, rng.beta(20, 2, (SETS, 64)))
    assert 0.93 <= covered(over_blocks(agreed, np.full(64, 300)), 20 / 22) <= 0.97


@pytest.mark.parametrize("rounds", [8, 16])
@pytest.mark.parametrize("kind", ["normal", "delays", "hits"])
def test_intervals_over_rounds_cover_a_speed_whatever_the_weather(kind: str, rounds: int) -> None:
    rng = np.random.default_rng(2)
    weather = rng.normal(0, 0.7, (SETS, rounds))  # of both: it cancels
    noise = rng.normal(0, 0.03, (2, SETS, rounds))
    if kind == "delays":
        noise = rng.exponential(0.05, noise.shape)
    if kind == "hits":  # one in ten, by a third of a round
        noise += rng.exponential(0.3, noise.shape) * (rng.random(noise.shape) < 0.1)
    ours, theirs = weather + noise
    parts = np.array_split(theirs - ours + np.log(1.5), 20)  # a bootstrap of all at once takes gigabytes
    found = Estimate(*np.concatenate([over_rounds(part) for part in parts], -1))
    assert 0.93 <= covered(found, np.log(1.5)) <= 0.97
    mean = (theirs - ours).std(-1, ddof=1).mean() / np.sqrt(rounds)
    assert np.mean(found.stderr) < {"normal": 1.15, "delays": 1.05, "hits": 0.75}[kind] * mean


@pytest.mark.parametrize(
    ("items", "tasks", "gained", "lost"),
    [
        (256, 1, 0.02, 0.05),
        (2000, 1, 0.003, 0.006),
        (50, 2, 0.05, 0.2),
    ],
)
def test_intervals_over_items_cover_the_difference_in_accuracy(
    items: int, tasks: int, gained: float, lost: float
) -> None:
    rng = np.random.default_rng(3)
    turned = rng.multinomial(items, [gained, lost, 1 - gained - lost], (SETS, tasks))
    assert 0.93 <= covered(over_items(turned[..., 0], turned[..., 1], items), gained - lost) <= 0.97


@pytest.mark.parametrize("name", list(divergence.QUANTILES))
def test_intervals_of_quantiles_cover_where_tokens_of_a_document_are_alike(name: str) -> None:
    rng, share, documents, tokens = np.random.default_rng(4), divergence.QUANTILES[name], 64, 200
    quantiles, below = [], []
    for _ in range(0, SETS, 200):
        nats = rng.normal(0, 0.3, (200, documents, 1)) + rng.normal(0, 1.5, (200, documents, tokens))
        found = np.quantile(nats.reshape(200, -1), [*divergence.GRID, share], axis=1).T
        quantiles.append(np.exp(found[:, :-1]))
        below.append((nats <= found[:, -1:, None]).sum(-1))
    found = of_quantile(
        share, np.concatenate(below), np.full(documents, tokens), divergence.GRID, np.concatenate(quantiles)
    )
    z = {0.5: 0.0, 0.99: 2.3263479}[share]
    assert 0.93 <= covered(found, float(np.exp(z * np.hypot(0.3, 1.5)))) <= 0.97


def test_the_quantiles_of_a_record_are_those_of_its_tokens() -> None:
    rng = np.random.default_rng(5)
    windows = [rng.lognormal(-3, 1.5, 127).astype(np.float32) for _ in range(64)]
    kept = divergence.samples(windows, [100] * 64)
    found, pooled = divergence.estimates(kept), np.concatenate(windows)
    assert found["kl_to_dense"].value == pytest.approx(pooled.mean(), rel=1e-5)
    assert found["top1_agreement"].value == pytest.approx(100 / 127)
    for name, share in divergence.QUANTILES.items():
        assert found[name].value == pytest.approx(np.quantile(pooled, share), rel=1e-3)
        assert found[name].low < found[name].value < found[name].high
    assert sum(map(len, kept.values())) < 64 * 5 + len(divergence.GRID) + 1
    few = divergence.estimates(divergence.samples(windows[:20], [100] * 20))
    assert np.isnan(few["kl_to_dense_p99"].low), "too few windows for an interval"


@pytest.mark.parametrize(("between", "within"), [(0.0, 0.02), (0.01, 0.01), (0.03, 0.005), (0.02, 0.1)])
@pytest.mark.parametrize("count", [8, 16])
def test_dense_against_itself_is_claimed_to_differ_no_oftener_than_the_level_says(
    between: float, within: float, count: int
) -> None:
    """`between` processes and `within` their rounds; the strays of the floor are of six other processes."""
    rng = np.random.default_rng(6)
    rounds = rng.normal(0, between, (SETS, 7, 1)) + rng.normal(0, within * np.sqrt(2), (SETS, 7, count))
    values, errors = trimmed_mean(rounds)
    claims = 0
    for value, error in zip(values, errors, strict=True):
        apart = paired.between(list(value[1:]), list(error[1:]))
        claims += p_of_student(value[0], *paired.with_strays(error[0], count, *apart)) < LEVEL
    assert claims / SETS <= LEVEL + 3 * np.sqrt(LEVEL / SETS)


def test_a_table_of_rows_that_do_not_differ_makes_a_false_claim_as_seldom_as_the_level_says() -> None:
    rng, rows, tables = np.random.default_rng(7), 10, 600
    most = LEVEL + 2 * np.sqrt(LEVEL / tables)
    wrong = {"nats": 0, "answers": 0}
    for _ in range(tables // 100):
        tokens = rng.integers(50, 500, 64)
        turned = rng.binomial(256, 0.1, (100, rows))
        gained = rng.binomial(turned, 0.5)
        found = {
            "nats": over_blocks(rng.normal(0, 1, (100, rows, 64)) * tokens, tokens).p,
            "answers": mcnemar(gained, turned - gained),
        }
        for name, p in found.items():
            wrong[name] += sum(
                min(holm(dict(zip("abcdefghij", row, strict=True))).values()) < LEVEL for row in p.tolist()
            )
    assert wrong["nats"] / tables <= most and wrong["answers"] / tables <= most


def test_the_smallest_detectable_difference_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(8)
    effect = detectable(1 / np.sqrt(64), 63, tests=5)
    found = over_blocks(rng.normal(effect, 1, (SETS, 64)))
    assert np.mean(found.p * 5 < LEVEL) == pytest.approx(0.8, abs=0.04)


def test_mcnemar_is_the_binomial_test_of_which_way_answers_turned() -> None:
    from scipy.stats import binomtest

    for gained, lost in ((0, 8), (3, 9), (40, 60), (5, 5), (7, 0)):
        assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert mcnemar(0, 0) == 1
    for tests in (1, 20):
        assert tests * mcnemar(0, turns_needed(tests)) < LEVEL <= tests * mcnemar(0, turns_needed(tests) - 1)


def test_holm_multiplies_each_p_by_the_tests_that_are_left() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    found = holm({"a": 0.5, "b": float("nan")})
    assert found["a"] == 0.5 and np.isnan(found["b"])


def test_ranks_leave_ties() -> None:
    values = {1: 1.0, 2: 1.1, 3: 3.0, 4: 9.0}
    found = ranks(list(values), lambda one, other: values[other] - values[one] > 0.5)
    assert found == {1: (1, True), 2: (1, True), 3: (3, False), 4: (4, False)}


def test_without_any_spread_an_interval_is_a_point_and_a_single_block_has_none() -> None:
    assert over_blocks([0.0, 0.0, 0.0]) == Estimate(0, 0, 0, 0, 1)
    assert over_blocks([2.0, 2.0], [1, 1]) == Estimate(2, 0, 2, 2, 0)
    value, *rest = over_blocks([3.0])
    assert value == 3 and np.isnan(rest).all()
    assert over_items([0], [0], [100])[:4] == (0, 0, 0, 0)


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
