"""Placements that reach to the last block: which one that is, the model says."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from reducers import (
    Drop,
    Identity,
    Placement,
    Ratio,
    ReducerError,
    ToMe,
    TopK,
    at,
    every,
    parse_blocks,
    placement_from,
    reduce_tokens,
)

from .conftest import make_vit

ALL = [{"at": "all", "stack": [{"name": "tome", "budget": {"drop": 1}}]}]


@pytest.mark.parametrize("depth", [1, 3, 12, 24])
@pytest.mark.parametrize("placement", [every(1, ToMe(Drop(1))), placement_from(ALL)], ids=["every", "all"])
@torch.no_grad()
def test_every_block_is_every_block_of_the_model_at_hand(placement, depth):
    images = torch.randn(1, 3, 48, 48)
    _, trace = reduce_tokens(make_vit(depth=depth), placement).trace(images)
    assert trace.tokens[0].tolist() == [37 - block for block in range(depth + 1)]


@pytest.mark.parametrize(("step", "start"), [(1, 0), (2, 0), (1, 2), (3, 1)])
def test_a_depth_given_and_a_depth_found_are_the_same_blocks(step, start):
    later, now = every(step, Identity(), start=start), every(step, Identity(), start=start, depth=7)
    assert list(now.blocks) == list(range(start, 7, step))
    assert later.resolve(7).blocks.keys() == now.blocks.keys()
    fast = reduce_tokens(make_vit(depth=7), later)
    assert fast.placement.blocks.keys() == now.blocks.keys()
    assert fast.first_block == start
    (stage,) = later.spec()
    assert parse_blocks(stage["at"], 7) == list(now.blocks)


@pytest.mark.parametrize("turned", [False, True])
def test_joined_before_or_after_the_depth_is_known_the_same_reducer_acts_first(turned):
    def joined(depth):
        pair = at([1, 3], TopK(Ratio(0.5))), every(1, ToMe(Drop(1)), depth=depth)
        return pair[1] | pair[0] if turned else pair[0] | pair[1]

    later = joined(None)
    assert later.resolve(4).spec() == joined(4).spec()
    assert reduce_tokens(make_vit(), later).placement.spec() == joined(4).spec()


def test_an_unresolved_placement_survives_being_written_as_data():
    placement = every(2, ToMe(Drop(1)), start=1) | at([3], TopK(Ratio(0.5))) | every(1, Identity())
    stages = placement.spec()
    assert [stage["at"] for stage in stages] == ["every 2 from 1", [3], "all"]
    assert placement_from(stages).spec() == stages
    assert placement_from(stages, depth=6).spec() == placement.resolve(6).spec()
    for again in (copy.deepcopy(placement), pickle.loads(pickle.dumps(placement))):
        assert again.spec() == stages
        assert again.resolve(6).spec() == placement.resolve(6).spec()


def test_blocks_that_are_not_known_yet_are_refused_with_the_remedy():
    placement = at(0, Identity()) | every(1, Identity())
    assert not placement.is_resolved
    with pytest.raises(ReducerError, match="depth="):
        _ = placement.blocks
    assert "Onwards" in repr(placement)
    assert placement == Placement(parts=placement.parts)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: every(1, Identity(), start=4).resolve(4),
        lambda: every(1, Identity(), start=4, depth=4),
        lambda: reduce_tokens(make_vit(), every(1, Identity(), start=4)),
        lambda: reduce_tokens(make_vit(), every(1, Identity(), depth=12)),
        lambda: reduce_tokens(make_vit(), placement_from([{"at": [4], "reducer": {"name": "identity"}}])),
        lambda: placement_from([{"at": "every 1 from 4", "reducer": {"name": "identity"}}], depth=4),
    ],
)
def test_blocks_outside_the_network_are_refused_once_it_is_known(wrap):
    with pytest.raises(ReducerError, match="block 4 is outside the network: its 4 blocks count from 0 to 3"):
        wrap()


@pytest.mark.parametrize("where", ["every", "every 0", "every -1", "every 2 from", "all from 3", "every 2, 3"])
def test_what_is_no_way_to_write_blocks_is_refused(where):
    with pytest.raises(ReducerError, match="blocks are written"):
        placement_from([{"at": where, "reducer": {"name": "identity"}}])


def test_a_step_or_start_that_is_none_is_refused():
    for step, start in ((0, 0), (1.0, 0), (1, -1), (1, "2")):
        with pytest.raises(ReducerError, match=r"every\("):
            every(step, Identity(), start=start)
    with pytest.raises(ReducerError, match="places a reducer"):
        every(1, "tome")


@pytest.mark.parametrize(
    ("depth", "first", "last", "thirds"),
    [
        (12, 0, list(range(3, 12)), [3, 6, 9]),
        (24, 0, list(range(6, 24)), [6, 12, 18]),
        (14, 4, list(range(6, 14)), [6, 9, 11]),  # the first four take no reducer: of the other ten, 7.5 are 8
        (3, 0, [1, 2], [0, 1, 2]),
    ],
)
def test_shares_of_the_blocks_where_reducers_may_act_are_known_once_the_network_is(depth, first, last, thirds):
    later = at({"last": 0.75}, Identity()), at({"thirds": True}, Identity())
    for placement, where, blocks in zip(later, ({"last": 0.75}, {"thirds": True}), (last, thirds), strict=True):
        assert not placement.is_resolved and placement.spec() == [{"at": where, "stack": [{"name": "identity"}]}]
        assert sorted(placement.resolve(depth, first).blocks) == blocks == parse_blocks(where, depth, first)
        assert sorted(placement_from(placement.spec(), depth, first).blocks) == blocks
    fast = reduce_tokens(make_vit(depth=12), later[0])
    assert sorted(fast.placement.blocks) == list(range(3, 12))


@pytest.mark.parametrize(
    ("share", "blocks"), [(1, 12), (0.01, 1), ("1/3", 4), (Fraction(1, 8), 2), (np.float32(0.5), 6), (0.29, 3)]
)
def test_a_share_of_blocks_is_rounded_to_the_nearest_and_is_at_least_one(share, blocks):
    placement = at({"last": share}, Identity())
    assert sorted(placement.resolve(12).blocks) == list(range(12 - blocks, 12))
    assert placement_from(placement.spec(), 12).spec() == placement.resolve(12).spec()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"last": 0}, "a share of the blocks above 0 and at most 1, such as 0.75"),
        ({"last": 1.2}, "a share of the blocks above 0 and at most 1"),
        ({"last": True}, "a share of the blocks"),
        ({"last": "3/0"}, "a share of the blocks"),
        ({"last": float("nan")}, "a share of the blocks"),
        ({"thirds": False}, r"says nothing; write \{thirds: true\}, or name blocks"),
        ({"first": 0.5}, r"blocks are written .*\{last: 0.75\}, \{thirds: true\} or \{from: 3\}"),
        ({"last": 0.5, "thirds": True}, "blocks are written"),
    ],
)
def test_what_is_no_share_of_blocks_is_refused_with_what_may_stand_there(where, message):
    for read in (lambda: at(where, Identity()), lambda: parse_blocks(where, 12)):
        with pytest.raises(ReducerError, match=message):
            read()


def test_thirds_of_two_blocks_are_refused_with_what_there_is():
    with pytest.raises(ReducerError, match=r"needs three blocks .* it has 4, and the first 2 take no reducer; name"):
        at({"thirds": True}, Identity()).resolve(4, 2)
    with pytest.raises(ReducerError, match="depends on the network: ask placement.resolve"):
        _ = at({"last": 0.5}, Identity()).blocks
