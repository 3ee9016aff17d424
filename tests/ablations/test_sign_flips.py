"""The sign-flip test and Student's interval against slow and independent references."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from ablations.records.mean import mean_interval, t95
from ablations.records.sign_flips import EXACT, sign_flips


def brute(differences: np.ndarray) -> tuple[float, float]:
    """(one-sided, two-sided), flip by flip, zeros among them."""
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    seen = float(differences.sum())
    return (
        sum(each >= seen - 1e-9 for each in sums) / len(sums),
        sum(abs(each) >= abs(seen) - 1e-9 for each in sums) / len(sums),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_few_images_are_flipped_in_every_way(seed: int) -> None:
    random = np.random.RandomState(seed)
    differences = random.randn(random.randint(1, 9))
    if seed % 3 == 0:
        differences = np.round(differences)  # ties and zeros
    found = sign_flips(differences)
    assert found.exact and (found.greater, found.either) == brute(differences)


def test_nothing_to_tell_is_told_by_a_p_value_of_one() -> None:
    assert sign_flips(np.zeros(50)).greater == sign_flips(np.array([])).either == 1.0
    with pytest.raises(ValueError, match="not finite"):
        sign_flips(np.array([1.0, np.nan]))


def test_drawn_flips_come_near_to_all_of_them() -> None:
    differences = np.random.RandomState(4).randn(EXACT) + 0.4
    every = sign_flips(differences)
    drawn = sign_flips(np.concatenate([differences, [1e-13]]), draws=20_000)  # one more, which decides nothing
    assert every.exact and not drawn.exact
    for one, other in ((every.greater, drawn.greater), (every.either, drawn.either)):
        assert other == pytest.approx(one, abs=4 * np.sqrt(one * (1 - one) / 20_000) + 1e-4)


@pytest.mark.parametrize("count", [6, 60])
def test_the_paired_test_is_symmetric(count: int) -> None:
    one, other = np.random.RandomState(7).randn(2, count)
    here, there = sign_flips(one - other), sign_flips(other - one)
    assert here.either == there.either and here == sign_flips(one - other), "and drawn from a seed"
    assert here.greater + there.greater == pytest.approx(1, abs=0.04)


def test_the_test_holds_its_level_where_there_is_no_difference() -> None:
    """Skewed values whose signs are fair: of 400 tests about 5 % find one, and no p-value is 0."""
    random = np.random.RandomState(2)
    found = [
        sign_flips(random.choice([-1, 1], 30) * random.exponential(size=30), draws=199, seed=seed)
        for seed in range(400)
    ]
    for p_values in ([each.greater for each in found], [each.either for each in found]):
        below = int(np.sum(np.array(p_values) <= 0.05))
        assert stats.binomtest(below, 400, 0.05).pvalue > 0.001
        assert min(p_values) >= 1 / 200


def test_a_difference_is_found() -> None:
    assert sign_flips(np.random.RandomState(0).randn(400) + 0.3).greater == 1 / 10_000


def test_quantiles_are_students() -> None:
    for freedom in (1, 2, 3, 4, 7, 30, 199, 200, 201, 202, 1000, 100_000):
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


def test_the_interval_of_a_mean_is_students_and_stays_where_values_lie() -> None:
    values = np.random.RandomState(5).uniform(0.2, 0.9, 17)
    expected = stats.t.interval(0.95, 16, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values.tolist()) == pytest.approx(expected, rel=1e-10)
    assert mean_interval(values[::-1].tolist()) == mean_interval(values.tolist())
    assert mean_interval([1.0, 1.0, 0.9], low=-1, high=1)[1] == 1.0
    assert mean_interval([0.3], low=-1, high=1) == (-1, 1)
