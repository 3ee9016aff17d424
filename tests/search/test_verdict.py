"""What may be said: only what the confirmation images tell, after all that was looked at is counted."""

from __future__ import annotations

import numpy as np
import pytest

from ablations.records.paired import holm, mcnemar
from ablations.search.planner import Candidate
from ablations.search.race import Standing
from ablations.search.verdict import compare, difference_interval, finalists, winner
from ablations.trial.stages import Stages
from tests.samples import sampled
from tests.search.conftest import paired


def standing(number: int, values: np.ndarray, label: str = "") -> Standing:
    found = Standing(Candidate(number, Stages(f"[{number}]"), label or str(number)))
    found.values.append(values)
    found.complete = True
    return found


@pytest.mark.parametrize("searches", sampled([250, 1000], quick=[250]))
def test_on_pure_noise_a_false_recommendation_is_rare(searches: int) -> None:
    """Searches in which every candidate is as good as every single method: the best of 60 candidates on the
    search images, three finalists, one comparator chosen there too.
    """
    draw, false = np.random.default_rng(0), 0
    for _ in range(searches):
        hard = draw.random((1, 500)) < 0.7
        own = draw.random((68, 500)) < 0.75
        right = np.where(draw.random((68, 500)) < 0.6, hard, own).astype(float)  # half of what is right is in common
        search, confirm = right[:, :200], right[:, 200:]
        singles, candidates = range(8), range(8, 68)
        comparator = max(singles, key=lambda one: search[one].mean())
        ranked = sorted((standing(one, search[one]) for one in candidates), key=lambda one: -one.mean)
        chosen = finalists(ranked, standing(comparator, search[comparator]))
        (found,) = compare([(confirm[comparator], [confirm[one.candidate.number] for one in chosen])], test=paired)
        false += winner(found) is not None
    assert false <= 0.06 * searches


def test_what_is_better_on_confirmation_images_alone_is_not_preferred() -> None:
    """A candidate that no search image speaks for is no finalist, however good it is on the others."""
    good = [standing(number, np.array([1.0] * (80 - number) + [0.0] * (20 + number))) for number in range(4)]
    planted = standing(9, np.array([1.0] * 60 + [0.0] * 40), "planted")
    comparator = standing(20, np.array([1.0] * 70 + [0.0] * 30))
    assert [one.candidate.number for one in finalists([*good, planted], comparator)] == [0, 1, 2]


def test_the_comparator_itself_is_no_finalist_and_nothing_worse_is() -> None:
    comparator = standing(1, np.array([1.0] * 7 + [0.0] * 3))
    same = Standing(Candidate(5, comparator.candidate.stages, "same"))
    same.values, same.complete = [np.ones(10)], True
    assert finalists([same, standing(2, np.zeros(10))], comparator) == []


def test_holm_goes_over_all_costs_of_a_call() -> None:
    draw = np.random.default_rng(3)
    arrays = [(draw.random(300) < share).astype(float) for share in (0.6, 0.7, 0.75, 0.5, 0.55)]
    found = compare([(arrays[0], arrays[1:3]), (arrays[3], arrays[4:])], test=paired)
    pairs = [(arrays[1], arrays[0]), (arrays[2], arrays[0]), (arrays[4], arrays[3])]
    raw = [mcnemar(int((one > other).sum()), int((other > one).sum()))[0] for one, other in pairs]
    assert [one.p for group in found for one in group] == pytest.approx(raw)
    assert [one.adjusted for group in found for one in group] == pytest.approx(holm(raw))


def test_of_those_told_apart_the_best_on_the_search_images_wins() -> None:
    comparator = np.zeros(100)
    some, more = np.array([1.0] * 20 + [0.0] * 80), np.array([1.0] * 40 + [0.0] * 60)
    (found,) = compare([(comparator, [comparator, some, more])], test=paired)
    assert winner(found) == 1, "finalists come in the order of the search images"
    assert winner(found[:1]) is None


def test_a_difference_of_cosines_has_the_interval_of_its_mean() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.random(400), draw.random(400)
    low, high = difference_interval(first, second)
    differences = first - second
    half = 1.959964 * differences.std(ddof=1) / 20
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), rel=1e-6)
