"""Numbers as other packages have them, and what becomes of halves."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from reducers import Count, Drop, Ratio, ReducerError, TopK, at, build, every, parse_budget, reduce_tokens

from .conftest import make_vit


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.array])
def test_whole_numbers_of_numpy_become_plain_ones(kind):
    for found in (
        Count(kind(5)).value,
        Drop(kind(5)).value,
        TopK(Count(5), seed=kind(5)).seed,
        at(kind(5), TopK(Count(5))).spec()[0]["at"][0],
    ):
        assert type(found) is int and found == 5
    assert at(np.array([3, 6]), TopK(Count(kind(5)))).spec() == at([3, 6], TopK(Count(5))).spec()
    assert list(every(kind(2), TopK(Count(5)), start=kind(1), depth=6).blocks) == [1, 3, 5]
    json.dumps(parse_budget({"count": kind(5)}).spec())


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array])
def test_numbers_of_numpy_become_plain_ones(kind):
    assert Ratio(kind(0.75)) == Ratio(0.75)
    gtp, avit = (
        build({"name": "gtp", "budget": {"drop": 5}, "theta": kind(0.5)}),
        build({"name": "avit", "beta": kind(-10)}),
    )
    assert type(gtp.theta) is float and gtp.theta == 0.5
    assert avit.beta == -10
    json.dumps([gtp.spec(), avit.spec()])


@pytest.mark.parametrize(
    "value", [True, np.True_, np.array(True), torch.tensor(3), 3.0, np.float64(3), "3", np.array([3]), None]
)
def test_what_is_no_whole_number_is_refused(value):
    for make in (
        lambda: Count(value),
        lambda: Drop(value),
        lambda: TopK(Count(3), seed=value),
        lambda: at([value], TopK(Count(3))),
    ):
        with pytest.raises(ReducerError):
            make()


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(0.5), "0.5", np.array([0.5]), np.float32("nan"), np.inf, 0.5j]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ReducerError):
        build({"name": "avit", "beta": value})


@pytest.mark.parametrize(
    ("ratio", "tokens", "floor", "ceil", "nearest"),
    [
        (0.5, 7, 3, 4, 4), (0.5, 9, 4, 5, 5), (0.5, 197, 98, 99, 99), (0.5, 1, 1, 1, 1),  # halves go up, odd or even
        (0.25, 6, 1, 2, 2), (0.75, 6, 4, 5, 5), (0.7, 10, 7, 7, 7), (0.7, 5, 3, 4, 4),
        (0.1 + 0.2, 10, 3, 3, 3), (0.29, 100, 29, 29, 29), (0.57, 100, 57, 57, 57), (0.07, 100, 7, 7, 7),
        (Fraction(1, 3), 9, 3, 3, 3), ("1/3", 10, 3, 4, 3), (2 / 3, 9, 6, 6, 6), (0.35, 10, 3, 4, 4),
    ],
)  # fmt: skip
def test_halves_and_floats_round_as_exact_shares_do(ratio, tokens, floor, ceil, nearest):
    rest = {"initial": 196, "prefix": 0}
    for rounding, expected in (("floor", floor), ("ceil", ceil), ("nearest", nearest)):
        budget, other = Ratio(ratio, rounding=rounding), "floor" if rounding == "ceil" else "ceil"
        assert budget.count(tokens, **rest, rounding=other) == expected
        counts = torch.tensor([tokens])
        assert budget.resolve(counts, initial=196, prefix=torch.zeros_like(counts), rounding=other).tolist() == [
            expected
        ]


ROUNDS = {
    "floor": ["topk", "random", "atc", "dpc_knn", "kmedoids", "token_pooling", "dynamicvit"],
    "ceil": ["evit", "tome", "gtp", "bat", "pitome", "tofu"],
}


@pytest.mark.parametrize("name", [name for names in ROUNDS.values() for name in names])
@torch.no_grad()
def test_a_method_rounds_as_it_says_unless_the_budget_says_otherwise(name, images):
    """Of 36 patches: 22 and a half, and a little less."""
    extra = {"weights": "equal"} if name in ("kmedoids", "token_pooling") else {}

    def kept(ratio: float, **budget: object) -> int:
        reducer = build({"name": name, "budget": {"ratio": ratio, **budget}, **extra})
        _, trace = reduce_tokens(make_vit(), at(1, reducer)).trace(images[:1])
        return int(trace.tokens[0, -1]) - 1 - (name == "evit")  # the class token, and what EViT fuses

    half, less = (22, 22) if name in ROUNDS["floor"] else (23, 23)
    assert (kept(0.625), kept(0.62)) == (half, less)
    assert [kept(0.62, rounding=rounding) for rounding in ("floor", "nearest", "ceil")] == [22, 22, 23]
    assert kept(0.625, rounding="nearest") == 23
