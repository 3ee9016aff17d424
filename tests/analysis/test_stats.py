"""Intervals and tests against known values, scipy, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis import stats


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (10, 10), (81, 100), (752, 928), (1, 3)])
def test_wilson_agrees_with_scipy(correct: int, images: int) -> None:
    expected = scipy_stats.binomtest(correct, images).proportion_ci(0.95, method="wilson")
    found = stats.wilson(correct, images)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == correct / images


def test_an_interval_needs_an_image() -> None:
    with pytest.raises(ValueError, match="at least one"):
        stats.wilson(0, 0)
    with pytest.raises(ValueError, match="at least one image"):
        stats.bootstrap([])


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        sample = random.exponential(2.0, size=80)
        found = stats.bootstrap(sample, draws=400, seed=trial)
        hits += found.low <= 2.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98  # skewed data of this size: a little below 95 %


def test_bootstrap_agrees_with_scipy_and_repeats_itself() -> None:
    sample = np.random.default_rng(1).normal(5, 2, 200)
    expected = scipy_stats.bootstrap((sample,), np.mean, method="percentile", rng=2).confidence_interval
    found = stats.bootstrap(sample, draws=9999)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)
    assert found == stats.bootstrap(sample, draws=9999)
    median = stats.bootstrap(sample, statistic=np.median)
    assert median.value == np.median(sample)


def test_mcnemar_is_the_exact_binomial_test_on_disagreements() -> None:
    first = np.array([True] * 60 + [True] * 15 + [False] * 5 + [False] * 20)
    second = np.array([True] * 60 + [False] * 15 + [True] * 5 + [False] * 20)
    found = stats.mcnemar(first, second)
    assert (found.first_only, found.second_only, found.images) == (15, 5, 100)
    assert found.difference == pytest.approx(0.10)
    assert found.p_value == pytest.approx(0.041389465, abs=1e-8)  # 2 * P(X <= 5), X ~ B(20, 1/2)
    assert found.discordance == pytest.approx(0.20)
    assert found.low < 0.10 < found.high


def test_mcnemar_of_equal_answers_is_one_with_an_interval_of_some_width() -> None:
    found = stats.mcnemar([True, False] * 50, [True, False] * 50)
    assert found.p_value == 1.0 and found.difference == 0.0
    assert -0.05 < found.low < 0 < found.high < 0.05


def test_interval_of_the_paired_difference_covers_it() -> None:
    random, hits = np.random.default_rng(3), 0
    for _ in range(500):
        outcome = random.choice(4, size=150, p=[0.7, 0.12, 0.06, 0.12])  # both, first only, second only, none
        found = stats.mcnemar(outcome <= 1, (outcome == 0) | (outcome == 2))
        hits += found.low <= 0.06 <= found.high
    assert 0.92 <= hits / 500 <= 0.98


def test_a_paired_test_refuses_answers_to_other_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        stats.mcnemar([True], [True, False])


def test_holm_on_a_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


def test_resolution_is_the_difference_found_in_four_of_five_repetitions() -> None:
    need = stats.resolution(1000, accuracy=0.8, discordance=0.1)
    assert need.unpaired == pytest.approx(2.8016 * math.sqrt(2 * 0.16 / 1000), rel=1e-3)
    assert need.paired < need.unpaired
    random, shown = np.random.default_rng(4), 0
    gain, loss = (0.1 + need.paired) / 2, (0.1 - need.paired) / 2
    for _ in range(400):
        outcome = random.choice(3, size=1000, p=[gain, loss, 0.9])
        shown += stats.mcnemar(outcome == 0, outcome == 1).p_value < 0.05
    assert 0.70 <= shown / 400 <= 0.87  # the exact test is a little conservative


def test_resolution_falls_with_images_and_never_exceeds_one() -> None:
    sizes = [stats.resolution(n, accuracy=0.8, discordance=0.05).paired for n in (20, 200, 2000)]
    assert sizes == sorted(sizes, reverse=True)
    assert stats.resolution(1, accuracy=0.5, discordance=0.0).paired <= 1.0


def test_spearman_agrees_with_scipy_and_its_interval_covers() -> None:
    random = np.random.default_rng(5)
    x = random.integers(0, 10, 500)
    y = x + random.normal(0, 5, 500)
    found = stats.spearman(x, y)
    assert found.value == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    assert math.isnan(stats.spearman([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).value)
    assert stats.spearman([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]).value == pytest.approx(1.0)


def test_counting_draws_is_the_bootstrap_itself() -> None:
    """Few different values: how often each is drawn is multinomial. Against resampled images, and scipy."""
    random = np.random.default_rng(6)
    values = random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=300)
    fast = stats.bootstrap(values, draws=20_000)
    slow = stats.bootstrap(values, draws=20_000, statistic=lambda data, axis: np.average(data, axis=axis))
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=0.004)
    theirs = scipy_stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert (fast.low, fast.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


@pytest.mark.parametrize(("share", "images"), [(0.8, 100), (0.8, 800), (0.95, 400), (0.5, 50)])
def test_bootstrap_of_an_accuracy_covers_it(share: float, images: int) -> None:
    random, hits = np.random.default_rng(7), 0
    for trial in range(400):
        found = stats.accuracy(random.random(images) < share, draws=1000, seed=trial)
        hits += found.low <= share <= found.high
    assert 0.915 <= hits / 400 <= 0.98  # 95 % within what 400 repetitions can tell; small samples a little below


def test_an_accuracy_without_spread_gets_wilsons_interval() -> None:
    found = stats.accuracy([True] * 30)
    assert found == stats.wilson(30, 30) and found.low < 1.0


@pytest.mark.parametrize(
    ("only_first", "only_second", "exact", "mid"),
    [
        # Agresti, Categorical Data Analysis: 86 and 150 changed their mind about the prime minister; exact p by
        # scipy.stats.binomtest, mid-p by its definition 2 (P(X < k) + P(X = k) / 2).
        (86, 150, 3.715e-05, 3.0e-05),
        (15, 5, 0.04138946533, 0.02660369873),
        (0, 3, 0.25, 0.125),
        (6, 6, 1.0, 1.0),
        (1, 0, 1.0, 0.5),
    ],
)
def test_mcnemar_on_known_tables(only_first: int, only_second: int, exact: float, mid: float) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True] * 700)
    second = np.array([False] * only_first + [True] * only_second + [True] * 700)
    found = stats.mcnemar(first, second)
    n, k = only_first + only_second, min(only_first, only_second)
    assert found.p_value == pytest.approx(scipy_stats.binomtest(only_first, n, 0.5).pvalue, rel=1e-12)
    by_definition = 2 * (scipy_stats.binom.cdf(k - 1, n, 0.5) + 0.5 * scipy_stats.binom.pmf(k, n, 0.5))
    assert found.mid_p == pytest.approx(min(1.0, by_definition), rel=1e-9)
    if n < 100:
        assert (found.p_value, found.mid_p) == pytest.approx((exact, mid), rel=1e-6)
    else:
        assert found.p_value < 1e-4 and found.mid_p < found.p_value
    assert found.boot_low <= found.difference <= found.boot_high


def test_mcnemar_holds_its_level_and_mid_p_is_less_conservative() -> None:
    random, exact, mid = np.random.default_rng(8), 0, 0
    for _ in range(2000):
        outcome = random.choice(3, size=300, p=[0.05, 0.05, 0.9])
        found = stats.mcnemar(outcome == 0, outcome == 1, draws=10)
        exact, mid = exact + (found.p_value < 0.05), mid + (found.mid_p < 0.05)
    assert exact <= mid and exact / 2000 <= 0.055 and 0.03 <= mid / 2000 <= 0.065


def test_paired_bootstrap_agrees_with_mcnemar_and_holds_its_level() -> None:
    random, rejected, hits = np.random.default_rng(9), 0, 0
    for _ in range(400):
        outcome = random.choice(3, size=400, p=[0.08, 0.08, 0.84])
        found = stats.paired_bootstrap(outcome == 0, outcome == 1, draws=1000)
        rejected += found.p_value < 0.05
        hits += found.low <= 0 <= found.high
    assert rejected / 400 <= 0.08 and 0.92 <= hits / 400 <= 0.99
    a, b = np.arange(500) % 10 < 8, np.arange(500) % 10 < 7
    boot, exact = stats.paired_bootstrap(a, b), stats.mcnemar(a, b)
    assert boot.difference == pytest.approx(exact.difference) and boot.p_value < 0.01 and exact.p_value < 0.01
    assert (boot.low, boot.high) == (exact.boot_low, exact.boot_high)


def test_the_test_fits_the_answers() -> None:
    whole, means = np.array([True, False] * 50), np.array([1.0, 1 / 3] * 50)
    assert stats.paired(whole, ~whole).test == "McNemar"
    found = stats.paired(means, whole)
    assert found.test == "paired bootstrap" and found.difference == pytest.approx(1 / 6) and math.isnan(found.mid_p)
    assert 0 < found.p_value < 0.01 and found.low < found.difference < found.high


def test_holm_controls_the_chance_of_any_false_finding() -> None:
    random = np.random.default_rng(10)
    wrong = sum(min(stats.holm(list(random.random(20)))) < 0.05 for _ in range(1000))
    assert wrong / 1000 <= 0.07


def test_a_paired_bootstrap_counts_every_tail_with_one_sample_more() -> None:
    """Where every resample says the same, p is not 0 but what the draws can tell; where nothing differs, 1."""
    better = np.array([1.0, 0.75, 0.5] * 20)
    found = stats.paired_bootstrap(better, better - 0.25, draws=999)
    assert found.p_value == 2 / 1000 and (found.low, found.high) == (0.25, 0.25)
    assert stats.paired_bootstrap(better - 0.25, better, draws=999).p_value == 2 / 1000
    assert stats.paired_bootstrap(better, better, draws=999).p_value == 1.0
    mixed = stats.paired_bootstrap([1.0, 0.5, 0.0], [0.0, 1.0, 0.0], draws=99)
    assert (mixed.first_only, mixed.second_only, mixed.images) == (1.0, 0.5, 3)
    assert mixed.difference == pytest.approx(1 / 6)


def test_another_seed_draws_other_samples_and_the_same_one_the_same() -> None:
    sample = np.random.default_rng(1).normal(5, 2, 200)
    for values in (sample, sample > 5):
        first, second = (stats.bootstrap(values, draws=500, seed=seed) for seed in (0, 1))
        assert first == stats.bootstrap(values, draws=500) and first != second
        assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.1)


@pytest.mark.parametrize(("images", "discordance"), [(20, 0.05), (20, 0.4), (1000, 0.1), (1000, 0.001)])
def test_the_smallest_difference_solves_connors_equation(images: int, discordance: float) -> None:
    """Where it is more than the share of disagreements it is all of them."""
    found = stats.resolution(images, accuracy=0.8, discordance=discordance).paired
    psi = max(discordance, found)
    right = 1.959963985 * math.sqrt(psi) + 0.841621234 * math.sqrt(psi - found**2)
    assert found * math.sqrt(images) == pytest.approx(right, rel=1e-4)


def test_an_interval_of_a_rank_correlation_by_hand() -> None:
    """Bonett and Wright: variance (1 + r^2 / 2) / (n - 3) of its inverse hyperbolic tangent; r = 1 - 6 x 20 / 990."""
    found = stats.spearman([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [2, 1, 4, 3, 5, 6, 9, 10, 7, 8])
    assert found.value == pytest.approx(1 - 6 * 20 / 990)
    half = 1.959963985 * math.sqrt((1 + found.value**2 / 2) / 7)
    assert math.atanh(found.low) == pytest.approx(math.atanh(found.value) - half)
    assert math.atanh(found.high) == pytest.approx(math.atanh(found.value) + half)
