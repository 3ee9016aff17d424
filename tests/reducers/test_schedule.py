"""Schedules: a total shared out over blocks, what a method makes of it, and how it is written."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Placement,
    Ratio,
    ReducerError,
    Stack,
    TokenReducer,
    ToMe,
    TopK,
    at,
    available,
    build,
    every,
    placement_from,
    reduce_tokens,
)
from reducers.schedule import (
    Early,
    Exponential,
    Flat,
    Late,
    Linear,
    Listed,
    Schedule,
    clipped,
    parse_schedule,
    share_out,
)

from .conftest import DEPTH, make_vit

LATE_192 = [0, 1, 3, 5, 7, 11, 14, 19, 24, 30, 36, 42]  # of DeiT-S, r = 8 on average (LaterIsBetter's rule)
LEAVING_192 = [197, 196, 193, 188, 181, 170, 156, 137, 113, 83, 47, 24]  # tokens, class token included
PATCHES = 36  # of ``make_vit``
totals, depths = st.integers(0, 400), st.integers(1, 30)
gammas = st.one_of(st.integers(0, 6), st.floats(0, 6, allow_nan=False))
schedules = st.one_of(
    st.just(Flat()),
    st.builds(Late, gammas),
    st.builds(Early, gammas),
    st.builds(Linear, st.integers(1, 20), st.integers(0, 20)),
    st.builds(Exponential, st.floats(-5, 5)),
)


# --- sharing out ------------------------------------------------------------------------------------------------------


@given(schedules, totals, depths)
def test_the_shares_sum_to_the_total_and_lie_within_one_of_their_exact_values(
    schedule: Schedule, total: int, blocks: int
) -> None:
    drops, weights = schedule.drops(total, blocks), schedule.weights(blocks)
    assert len(drops) == blocks and sum(drops) == total and min(drops) >= 0
    for drop, weight in zip(drops, weights, strict=True):
        assert abs(drop - total * weight / sum(weights)) < 1


@given(gammas, totals, depths)
def test_late_never_falls_and_early_is_its_reverse(gamma: float, total: int, blocks: int) -> None:
    late = Late(gamma).drops(total, blocks)
    assert late == sorted(late)
    assert Early(gamma).drops(total, blocks) == late[::-1]


@given(st.integers(0, 30), depths)
def test_a_multiple_of_the_blocks_is_the_same_everywhere_where_all_weigh_alike(each: int, blocks: int) -> None:
    for schedule in (Flat(), Late(0), Late(0.0), Early(0), Linear(3, 3), Exponential(0)):
        assert schedule.drops(each * blocks, blocks) == [each] * blocks


@settings(max_examples=60)
@given(st.integers(0, 12), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_no_other_shares_are_nearer_and_of_those_as_near_the_latest_are_taken(total: int, parts: list[int]) -> None:
    """Largest remainder is what minimises the squared distance to the exact shares (and any other such norm)."""
    weights = [Fraction(part) for part in parts]
    exact = [total * weight / sum(weights) for weight in weights]
    possible = [p for p in itertools.product(range(total + 1), repeat=len(parts)) if sum(p) == total]
    distance = {p: sum((a - b) ** 2 for a, b in zip(p, exact, strict=True)) for p in possible}
    least = min(distance.values())
    latest = min(p for p in possible if distance[p] == least)  # the first block as little as possible, and so on
    assert share_out(total, weights) == list(latest)


def test_the_published_list() -> None:
    assert Late(2).drops(192, 12) == Late().drops(192, 12) == LATE_192
    spent = clipped(LATE_192, 196)
    assert sum(spent) == 173 and spent[:-1] == LATE_192[:-1]
    left = list(itertools.accumulate(spent, lambda tokens, drop: tokens - drop, initial=197))[1:]
    assert left == LEAVING_192


def test_powers_that_are_no_whole_ones_are_cut_to_twelve_digits() -> None:
    assert Late(0.5).weights(2) == [Fraction("0.707106781187"), 1]
    assert Exponential(1).weights(2) == [1, Fraction("2.71828182846")]
    assert Exponential(3).weights(1) == [1]
    assert Late(2.0).weights(3) == [Fraction(1, 9), Fraction(4, 9), 1], "2.0 is a whole power"


def test_what_a_block_cannot_spend_is_not_passed_on() -> None:
    assert clipped([10, 10, 10, 1], 20) == [10, 5, 2, 1]
    assert clipped([0, 3], 1) == [0, 0], "the last token stays"


# --- what becomes of it -----------------------------------------------------------------------------------------------

SHARED = {
    name: method
    for name, method in available().items()
    if method.scheduled_as
    and "images" in method.traits.inputs
    and any(parameter.name == "budget" for parameter in method.settings())
}
FROM_BLOCK_1 = {"kmedoids", "token_pooling"}  # weigh by the attention of the block before


def leaving(placement: Placement, images: torch.Tensor, **kind: str) -> list[set[int]]:
    """Patches that leave each block: the numbers there are among the images."""
    model = make_vit(**kind)
    with torch.no_grad():
        _, trace = reduce_tokens(model, placement).trace(images)
    return [set((counts - 1).tolist()) for counts in trace.tokens[:, 1:].T]


@pytest.mark.parametrize("name", sorted(SHARED))
def test_every_method_is_left_with_the_same_counts(name: str, images: torch.Tensor) -> None:
    blocks = list(range(1, DEPTH))  # three of them
    drops = Late(1).drops(24, 3)
    assert drops == [4, 8, 12]
    reducer = build({"name": name, "budget": {"drop": 24}})
    expected = [36, 32, 24, 12]
    found = leaving(at(blocks, reducer, schedule=Late(1)), images)
    if name == "evit":
        expected = [36, 33, 25, 13]  # the fused token, once
    if name == "fixed_pattern":
        expected = [36, 32, 24, 12]  # rings of 6 x 6 patches: 4, 12, 16, 24, 32, 36
    if name == "ats":
        assert all(most <= bound for bound, counts in zip(expected, found, strict=True) for most in counts)
        assert len(found[-1]) >= 1 and max(found[1]) < 36
    else:
        assert found == [{count} for count in expected]


def test_a_flat_schedule_is_the_method_itself(images: torch.Tensor) -> None:
    model = make_vit()
    for name in ("tome", "pitome", "tofu"):
        method = build({"name": name, "budget": {"drop": 4}})
        shared = build({"name": name, "budget": {"drop": 4 * DEPTH}})
        itself, scheduled = every(1, method, depth=DEPTH), every(1, shared, schedule=Flat())
        assert scheduled.resolve(DEPTH, patches=PATCHES).spec() == itself.spec(), "one reducer for all blocks"
        with torch.no_grad():
            both = [reduce_tokens(model, placement)(images) for placement in (itself, scheduled)]
        assert torch.equal(*both)
    topk = at([1, 2], TopK(Count(30))) | at([3], TopK(Count(18)))
    with torch.no_grad():
        expected = reduce_tokens(model, topk)(images)
        found = reduce_tokens(model, at([1, 2, 3], TopK(Drop(18)), schedule=Listed((6, 0, 12))))(images)
    assert torch.equal(expected, found)


def test_it_waits_for_the_model_as_blocks_do() -> None:
    placement = at({"last": 0.75}, ToMe(Drop(24)), schedule=Late(1))
    assert placement.is_scheduled and not placement.is_resolved
    with pytest.raises(ReducerError, match="depends on the network"):
        _ = placement.blocks
    here = placement.resolve(DEPTH)
    assert here.is_scheduled and here.spec() == [
        {"at": [1, 2, 3], "stack": [{"name": "tome", "budget": {"drop": 24}, "schedule": {"late": 1}}]}
    ]
    with pytest.raises(ReducerError, match="number of patches"):
        _ = here.blocks
    there = here.resolve(DEPTH, patches=PATCHES)
    assert {block: reducer.spec()["budget"] for block, reducer in there.blocks.items()} == {
        1: {"drop": 4}, 2: {"drop": 8}, 3: {"drop": 12}
    }  # fmt: skip
    assert reduce_tokens(make_vit(), placement).placement.spec() == there.spec()
    with pytest.raises(ReducerError, match="outside the network"):
        at([3, DEPTH], ToMe(Drop(24)), schedule=Flat()).resolve(DEPTH)


def test_one_reducer_for_each_number_and_none_where_nothing_goes() -> None:
    blocks = every(1, ToMe(Drop(192)), schedule=Early(2)).resolve(12, patches=196).blocks
    assert sorted(blocks) == list(range(11)), "the last share is 0"
    numbers = [reducer.spec()["budget"]["drop"] for reducer in blocks.values()]
    assert numbers == clipped(LATE_192[::-1], 196)[:-1]
    same = at([0, 1, 2], ToMe(Drop(7)), schedule=Listed((2, 3, 2))).resolve(3, patches=20).blocks
    assert same[0] is same[2] and same[0] is not same[1]


def test_settings_and_selectors_are_those_of_the_method() -> None:
    method = EViT(Drop(12), fuse=False, select=ATS(Ratio(1.0), heads="per_head"))
    blocks = at([1, 2], method, schedule=Flat()).resolve(3, patches=20).blocks
    assert [blocks[1].spec(), blocks[2].spec()] == [
        {**method.spec(), "budget": {"count": 14}}, {**method.spec(), "budget": {"count": 8}}
    ]  # fmt: skip


def test_a_member_of_a_stack_may_have_one(images: torch.Tensor) -> None:
    tome = {"name": "tome", "budget": {"drop": 9}, "schedule": [2, 7]}
    stages = [{"at": [1, 2], "stack": [{"name": "topk", "budget": {"ratio": 0.75}}, tome]}]
    placement = placement_from(stages, DEPTH, patches=PATCHES)
    assert isinstance(placement.blocks[1], Stack)
    assert placement.spec() == [
        {"at": [block], "stack": [stages[0]["stack"][0], {"name": "tome", "budget": {"drop": drop}}]}
        for block, drop in ((1, 2), (2, 7))
    ]
    assert leaving(placement_from(stages), images) == [{36}, {25}, {11}, {11}]  # 27 - 2, floor(0.75 x 25) - 7
    with pytest.raises(ReducerError, match="does more than decide"):
        placement_from([{"at": [1, 2], "stack": [{"name": "small_input", "budget": {"count": 9}}, tome]}])


def test_late_costs_what_it_should_at_deit_small() -> None:
    """3.384 and 3.416 GMACs without the matching's own: d for each pair of the two sets, D for each token averaged."""
    model = timm.create_model("deit_small_patch16_224").eval()
    image = torch.zeros(1, 3, 224, 224)

    def gmacs(schedule: Schedule, total: int) -> float:
        fast = reduce_tokens(model, every(1, ToMe(Drop(total)), schedule=schedule))
        drops = clipped(schedule.drops(total, 12), 196)
        entering = itertools.accumulate(drops, lambda tokens, drop: tokens - drop, initial=197)
        own = sum((n + 1) // 2 * (n // 2) * 64 + n * 384 for n, drop in zip(entering, drops, strict=False) if drop)
        return (float(fast.cost(image)) - own) / 1e9

    assert gmacs(Late(2), 192) == pytest.approx(3.384, abs=5e-4)
    assert gmacs(Flat(), 12 * 8) == pytest.approx(3.416, abs=5e-4)


def test_the_table_of_the_documents_is_what_comes_out() -> None:
    text = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| `(.+)` \| (\d+) \| ([\d ]+) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(written) == 6
    model, image = timm.create_model("deit_small_patch16_224").eval(), torch.zeros(1, 3, 224, 224)

    def gmacs(total: str, schedule: Schedule) -> float:
        return float(reduce_tokens(model, every(1, ToMe(Drop(int(total))), schedule=schedule)).cost(image)) / 1e9

    for data, total, removed, gone, cost in written:
        schedule = parse_schedule(yaml.safe_load(data))
        spent = clipped(schedule.drops(int(total), 12), 196)
        assert removed == " ".join(map(str, spent)) and int(gone) == sum(spent)
        assert f"{gmacs(total, schedule):.3f}" == cost
    assert gmacs("188", Late(2)) <= gmacs("96", Flat()) < gmacs("187", Late(2))


# --- as data ----------------------------------------------------------------------------------------------------------

WRITTEN: dict[str, tuple[object, Schedule]] = {
    "flat": ("flat", Flat()),
    "late": ({"late": 2}, Late(2)),
    "late half": ({"late": 0.5}, Late(0.5)),
    "early": ({"early": 2}, Early(2)),
    "linear": ({"linear": [4, 12]}, Linear(4, 12)),
    "exponential": ({"exponential": 1.5}, Exponential(1.5)),
    "listed": ([0, 1, 3, 5], Listed((0, 1, 3, 5))),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_it_is_written_as_data_and_read_back(name: str) -> None:
    data, schedule = WRITTEN[name]
    assert parse_schedule(data) == schedule and schedule.spec() == data
    stages = [{"at": [0, 1, 2, 3], "stack": [{"name": "tome", "budget": {"drop": 9}, "schedule": data}]}]
    waiting = placement_from(stages)
    assert waiting.spec() == stages
    plain = waiting.resolve(4, patches=40).spec()
    assert placement_from(plain).spec() == plain and "schedule" not in str(plain)


def test_a_list_needs_no_budget() -> None:
    bare = placement_from([{"at": [1, 2], "reducer": {"name": "tome", "schedule": [3, 4]}}])
    assert bare.spec() == [
        {"at": [1, 2], "stack": [{"name": "tome", "budget": {"drop": 7}, "schedule": [3, 4]}]}
    ]  # fmt: skip


def test_the_order_of_blocks_is_the_networks() -> None:
    blocks = at([3, 1, 2], ToMe(Drop(6)), schedule=Listed((1, 2, 3))).resolve(4, patches=30).blocks
    assert {block: blocks[block].spec()["budget"]["drop"] for block in blocks} == {1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize(
    "bad",
    [
        "late", None, 2, {}, {"late": -1}, {"late": "2"}, {"late": True}, {"late": math.inf}, {"late": 99},
        {"late": [2]},
        {"later": 2}, {"late": 2, "early": 2}, {"linear": [4]}, {"linear": 4}, {"linear": [0, 0]}, {"linear": [-1, 3]},
        {"linear": [1, math.nan]}, {"exponential": "e"}, {"exponential": 100}, {2: 2}, [], [0, 0], [1, -1], [1.5, 2],
        ["1", 2], [True, 1], [10**9, 1], [[1], 2], {"flat": 1},
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(bad: object) -> None:
    with pytest.raises(ReducerError):
        parse_schedule(bad)


REFUSED = {
    "the total over all blocks": {"name": "tome", "budget": {"ratio": 0.5}, "schedule": "flat"},
    "takes no schedule": {"name": "small_input", "budget": {"drop": 5}, "schedule": "flat"},
    "identity takes no schedule": {"name": "identity", "schedule": "flat"},
    "a stack has no schedule": {"name": "stack", "stack": [{"name": "identity"}], "schedule": "flat"},
    "needs budget": {"name": "tome", "schedule": "flat"},
    "has 3 numbers, and there are 2 blocks": {"name": "tome", "schedule": [1, 2, 3]},
    "sums to 3, and the budget is 4": {"name": "tome", "budget": {"drop": 4}, "schedule": [1, 2]},
    "a schedule is written": {"name": "tome", "budget": {"drop": 4}, "schedule": "latest"},
    "read with its stage": {
        "name": "evit", "budget": {"ratio": 0.5},
        "select": {"name": "ats", "budget": {"drop": 5}, "schedule": "flat"},
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_have_one_is_told_why(message: str) -> None:
    with pytest.raises(ReducerError, match=message):
        placement_from([{"at": [1, 2], "stack": [REFUSED[message]]}], 4, patches=40)


def test_python_gets_the_same_refusals() -> None:
    with pytest.raises(ReducerError, match="such as Late"):
        at([1], ToMe(Drop(3)), schedule="late")  # type: ignore[arg-type]
    with pytest.raises(ReducerError, match="the total over all blocks"):
        every(1, TopK(Ratio(0.5)), schedule=Flat())


def test_methods_that_cannot_have_one_say_so() -> None:
    """Beside those without a budget: where the count at a block is not the budget's own."""
    none = {name for name, method in available().items() if method.scheduled_as is None}
    assert none == {
        "back_tracking", "dynamicvit", "fewer_frames", "rlt", "small_input", "sttabt", "stvit", "stvit_r", "tps"
    }  # fmt: skip
    assert {name for name, method in available().items() if method.scheduled_as == "drop"} == {"tome", "tofu", "pitome"}
    assert TokenReducer.scheduled_as == "count"
