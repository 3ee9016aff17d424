"""Budgets are exact integer arithmetic, and impossible ones are refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reducers import Count, Drop, Ratio, ReducerError, parse_budget


def keep(budget, current, *, initial=196, prefix=1, rounding="floor"):
    return budget.count(current, initial=initial, prefix=prefix, rounding=rounding)


@given(st.integers(1, 999), st.integers(0, 2000))
def test_a_ratio_rounds_like_exact_fractions(thousandths, current):
    ratio, exact = Ratio(thousandths / 1000), Fraction(thousandths, 1000) * current
    least = min(1, current)
    assert keep(ratio, current, rounding="floor") == max(math.floor(exact), least)
    assert keep(ratio, current, rounding="ceil") == math.ceil(exact)
    assert keep(ratio, current, rounding="nearest") == max(math.floor(exact + Fraction(1, 2)), least)


def test_shares_are_exact_whatever_floats_say():
    trap = [n for n in range(1, 1000) if math.ceil(0.07 * n) != math.ceil(Fraction(7, 100) * n)]
    assert trap, "in floats, seven hundredths of a hundred are more than seven"
    assert all(keep(Ratio(0.07), n, rounding="ceil") == math.ceil(Fraction(7, 100) * n) for n in trap)


def test_the_authors_evit_counts():
    assert [keep(Ratio(0.7), n, rounding="ceil") for n in (196, 139, 99)] == [138, 98, 70]


def test_both_readings_of_0865():
    assert keep(Ratio(0.865), 196) == 169  # of patches
    assert keep(Ratio(0.865, count_prefix=True), 196) + 1 == 170  # of all tokens


def test_a_share_of_the_initial_tokens_does_not_depend_on_what_is_left():
    assert keep(Ratio("48/196", of="initial", rounding="nearest"), 150) == 48
    assert keep(Ratio("48/196", of="initial", rounding="nearest"), 60, initial=64) == 16
    assert keep(Ratio("48/196", of="initial"), 30) == 30  # never more than there are


def test_budgets_resolve_image_by_image_and_leave_at_least_one():
    current = torch.tensor([0, 1, 10, 196])
    options = {"initial": 196, "prefix": torch.ones(4, dtype=torch.int64), "rounding": "floor"}
    assert Ratio(0.5).resolve(current, **options).tolist() == [0, 1, 5, 98]
    assert Count(8).resolve(current, **options).tolist() == [0, 1, 8, 8]
    assert Drop(13).resolve(current, **options).tolist() == [0, 1, 1, 183]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ratio(0), lambda: Ratio(-0.1), lambda: Ratio(1.01), lambda: Ratio("half"),
        lambda: Ratio(0.5, of="first"),
        lambda: Ratio(0.5, rounding="up"), lambda: Count(0), lambda: Count(-3), lambda: Count(1.5), lambda: Count(True),
        lambda: Drop(-1), lambda: Ratio(float("nan")), lambda: Ratio("1/0"),
    ],
)  # fmt: skip
def test_impossible_budgets_are_refused(make):
    with pytest.raises(ReducerError):
        make()


@pytest.mark.parametrize(
    "data", [7, None, {}, {"ratio": 0.5, "count": 3}, {"count": 3, "of": "initial"}, {"keep": 0.5}]
)
def test_budgets_that_are_no_budgets_say_how_one_is_written(data):
    with pytest.raises(ReducerError, match="a budget is written"):
        parse_budget(data)


@pytest.mark.parametrize(
    "budget",
    [Ratio(0.7), Ratio("48/196", of="initial", rounding="nearest"), Ratio(0.865, count_prefix=True), Count(5), Drop(0)],
)
def test_budgets_survive_being_written_as_data(budget):
    assert parse_budget(budget.spec()) == budget
