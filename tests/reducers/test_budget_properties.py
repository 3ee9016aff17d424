"""Whatever a budget is made of: it survives being written, counts like its tensors, and nothing else passes for one."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reducers import Budget, Count, Drop, Ratio, ReducerError, parse_budget
from reducers.budget import Rounding

ROUNDINGS = get_args(Rounding)
shares = st.integers(1, 10**6).flatmap(lambda d: st.integers(1, d).map(lambda n: Fraction(n, d)))
ratios = st.builds(
    Ratio,
    shares,
    of=st.sampled_from(["current", "initial"]),
    rounding=st.none() | st.sampled_from(ROUNDINGS),
    count_prefix=st.booleans(),
)
budgets: st.SearchStrategy[Budget] = ratios | st.integers(1, 10**6).map(Count) | st.integers(0, 10**6).map(Drop)
roundings = st.sampled_from(ROUNDINGS)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@given(budgets)
def test_every_budget_survives_being_written_as_json(budget: Budget) -> None:
    again = parse_budget(json.loads(json.dumps(budget.spec(), allow_nan=False)))
    assert again == budget and again.spec() == budget.spec()


@given(budgets, st.lists(st.integers(0, 5000), min_size=1, max_size=6), st.integers(1, 5000), st.data())
def test_a_batch_is_counted_like_its_images(budget: Budget, current: list[int], initial: int, data) -> None:
    rounding = data.draw(roundings)
    prefix = data.draw(st.lists(st.integers(0, 5), min_size=len(current), max_size=len(current)))
    options = {"initial": initial, "prefix": torch.tensor(prefix), "rounding": rounding}
    together = budget.resolve(torch.tensor(current), **options).tolist()
    alone = [
        budget.count(n, initial=initial, prefix=p, rounding=rounding) for n, p in zip(current, prefix, strict=True)
    ]
    assert together == alone
    assert all(min(1, n) <= kept <= n for kept, n in zip(together, current, strict=True))
    points = budget.points(torch.tensor(current), **options)
    assert (points >= 1).all() and torch.equal(points.minimum(torch.tensor(current)), torch.tensor(together))


@given(shares, shares, st.integers(0, 5000), roundings)
def test_a_larger_share_and_more_tokens_never_keep_fewer(one: Fraction, other: Fraction, current: int, rounding):
    def kept(share: Fraction, tokens: int) -> int:
        return Ratio(share).count(tokens, initial=196, prefix=1, rounding=rounding)

    small, large = sorted((one, other))
    assert kept(small, current) <= kept(large, current)
    assert kept(small, current) <= kept(small, current + 1) <= kept(small, current) + 1


@given(shares, st.integers(1, 5000))
def test_the_roundings_bracket_the_exact_share(share: Fraction, current: int) -> None:
    down, near, up = (
        Ratio(share, rounding=rule).point_count(current, initial=1, prefix=0, rounding="floor")
        for rule in ("floor", "nearest", "ceil")
    )
    exact = share * current
    assert up - 1 < exact <= up
    assert down == max(1, exact.__floor__()) and down <= max(1, near) <= up
    assert near == 1 or abs(near - exact) <= Fraction(1, 2)


@given(shares)
def test_every_spelling_of_a_share_is_the_same_budget(share: Fraction) -> None:
    spelled = [Ratio(share), Ratio(f"{share.numerator}/{share.denominator}"), Ratio(str(share))]
    doubled = Ratio(f"{2 * share.numerator}/{2 * share.denominator}")
    assert {json.dumps(ratio.spec()) for ratio in (*spelled, doubled)} == {json.dumps(doubled.spec())}


@given(plain | st.dictionaries(st.sampled_from(["ratio", "count", "drop", "of", "rounding", "count_prefix"]), plain))
def test_anything_else_is_refused_as_no_budget(data: object) -> None:
    try:
        budget = parse_budget(data)
    except ReducerError:
        return
    assert isinstance(budget, Budget) and parse_budget(budget.spec()) == budget


@pytest.mark.parametrize("text", ["1e-999999999", "1E+999999999", "1e-1_000_000_000", "0." + "1" * 1000, "9" * 5000])
def test_a_number_whose_digits_would_fill_the_memory_is_refused_at_once(text: str) -> None:
    with pytest.raises(ReducerError):
        Ratio(text)


@pytest.mark.parametrize("word", ["no", "false", 0, None])
def test_a_word_is_not_taken_for_true(word: object) -> None:
    with pytest.raises(ReducerError, match="count_prefix"):
        parse_budget({"ratio": 0.5, "count_prefix": word})
