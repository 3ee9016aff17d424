"""Placements, registry and errors."""

from __future__ import annotations

import pytest
import torch

from reducers import (
    ATS,
    Count,
    EViT,
    Identity,
    Ratio,
    ReducerError,
    Stack,
    ToMe,
    TopK,
    at,
    available,
    build,
    every,
    placement_from,
    reduce_tokens,
)  # fmt: skip
from reducers.registry import register

from .conftest import make_vit


def test_placements_join_and_stack_where_they_meet():
    joined = at([1, 2], TopK(Ratio(0.5))) | at([2, 3], ATS(Count(4)))
    assert sorted(joined.blocks) == [1, 2, 3]
    assert isinstance(joined.blocks[2], Stack)
    assert [member.name for member in joined.blocks[2].members] == ["topk", "ats"]


def test_every_places_by_step():
    assert sorted(every(3, Identity(), start=3, depth=12).blocks) == [3, 6, 9]
    with pytest.raises(ReducerError):
        every(0, Identity())


def test_placements_survive_being_written_as_data():
    stages = [
        {"at": [3, 6], "stack": [{"name": "evit", "budget": {"ratio": 0.7}}, {"name": "ats", "budget": {"count": 9}}]}
    ]
    placement = placement_from(stages)
    assert placement.spec() == stages
    assert placement_from(placement.spec()).spec() == stages


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (3, [3]),
        ("3-5", [3, 4, 5]),
        ("1, 4-5", [1, 4, 5]),
        ("all", list(range(12))),
        ("every 4 from 3", [3, 7, 11]),
        ([3, 6], [3, 6]),
    ],
)
def test_blocks_are_written_in_several_ways(where, blocks):
    assert sorted(placement_from([{"at": where, "reducer": {"name": "identity"}}], depth=12).blocks) == blocks


IDENTITY = {"name": "identity"}
BAD = {
    "did you mean 'evit'": [{"at": [3], "reducer": {"name": "evitt", "budget": {"ratio": 0.5}}}],
    "block 14 is outside the network": [{"at": [14], "reducer": IDENTITY}],
    "no setting 'keep'": [{"at": [3], "reducer": {"name": "topk", "keep": 0.5}}],
    "needs budget": [{"at": [3], "reducer": {"name": "topk"}}],
    "unknown score": [{"at": [3], "reducer": {"name": "topk", "budget": {"count": 3}, "score": "attn"}}],
    "must lie in": [{"at": [3], "reducer": {"name": "topk", "budget": {"ratio": 1.5}}}],
    "at least 1": [{"at": [3], "reducer": {"name": "topk", "budget": {"count": 0}}}],
    "a stage is written": [{"at": [3]}],
    "unknown key": [{"at": [3], "reducer": IDENTITY, "when": 3}],
    "blocks are written": [{"at": "3..5", "reducer": IDENTITY}],
    "is empty": [{"at": [3], "stack": []}],
    "named twice": [{"at": [3, 3], "reducer": IDENTITY}],
    "a reducer is written": [{"at": [3], "reducer": "topk"}],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_placements_name_the_cause(message):
    with pytest.raises(ReducerError, match=message.replace("(", r"\(")):
        placement_from(BAD[message], depth=12)


def test_a_reducer_that_needs_the_class_token_after_it_may_be_gone_is_refused():
    dropper = ATS(Count(5), keep_class_token=False)
    with pytest.raises(ReducerError, match="may have dropped"):
        reduce_tokens(make_vit(), at(1, dropper) | at(2, TopK(Ratio(0.5))))
    reduce_tokens(make_vit(), at(1, dropper) | at(2, TopK(Ratio(0.5), score="attention_received")))


def test_things_that_are_no_placement_are_refused():
    with pytest.raises(ReducerError, match="needs a placement"):
        reduce_tokens(make_vit(), TopK(Ratio(0.5)))
    with pytest.raises(ReducerError, match="places a reducer"):
        at([3], "topk")
    with pytest.raises(ReducerError, match="empty"):
        Stack()


def test_names_are_registered_once():
    with pytest.raises(ReducerError, match="unique"):
        register("topk")(type("Again", (TopK,), {}))
    assert "stack" not in available()
    assert {"identity", "random", "topk", "ats", "evit", "tome"} <= set(available())


def test_build_reads_nested_reducers():
    reducer = build({"name": "evit", "budget": {"ratio": 0.7}, "select": {"name": "ats", "budget": {"count": 9}}})
    assert isinstance(reducer, EViT)
    assert isinstance(reducer.select, ATS)
    with pytest.raises(ReducerError, match="must only decide, and keep"):
        EViT(Ratio(0.7), select=ATS(Count(4), keep_class_token=False))
    with pytest.raises(ReducerError, match="keep or drop"):
        reduce_tokens(make_vit(), at(1, EViT(Ratio(0.7), select=ToMe(Ratio(0.7)))))(torch.randn(1, 3, 48, 48))
