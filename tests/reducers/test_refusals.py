"""What is refused when it is written or placed, each by the message that says why."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

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
    UnsupportedModel,
    at,
    build,
    placement_from,
    reduce_tokens,
)  # fmt: skip
from reducers.checks import checked_share, checked_weight, checked_whole, checked_within, finite_number, whole_number
from reducers.hosts import host_of
from reducers.placement import parse_blocks

from .conftest import make_vit

IDENTITY = {"name": "identity"}


def dynamicvit():
    return build({"name": "dynamicvit", "budget": {"ratio": 0.5}})


@pytest.mark.parametrize("where", [[3, "4"], [2.5], [3, None], [True, 2], (1, 2.0)])
def test_a_list_of_blocks_of_which_one_is_no_block_is_refused_whole(where):
    for read in (lambda: placement_from([{"at": where, "reducer": IDENTITY}]), lambda: parse_blocks(where, 12)):
        with pytest.raises(ReducerError, match="blocks are written"):
            read()


@pytest.mark.parametrize("where", [-1, [0, -2], [-12]])
def test_blocks_do_not_count_from_the_end(where):
    for place in (lambda: at(where, Identity()).resolve(4), lambda: reduce_tokens(make_vit(), at(where, Identity()))):
        with pytest.raises(ReducerError, match=r"block -\d+ is outside the network: its 4 blocks count from 0 to 3"):
            place()


def test_a_stage_whose_stack_is_empty_is_refused():
    with pytest.raises(ReducerError, match=r"the stack of stage .* is empty; leave the stage out"):
        placement_from([{"at": 3, "stack": []}])


def test_what_acts_before_the_attention_is_refused_behind_what_acts_after_it():
    first = build({"name": "dpc_knn", "budget": {"ratio": 0.5}, "site": "input"})
    with pytest.raises(ReducerError, match="put them first in the stack"):
        Stack(TopK(Ratio(0.5)), first)
    with pytest.raises(ReducerError, match="put them first in the stack"):
        at(1, TopK(Ratio(0.5))) | at([0, 1], first)
    assert [member.name for member in Stack(first, TopK(Ratio(0.5))).members] == ["dpc_knn", "topk"]


@pytest.mark.parametrize("kind", ["average", "map"])
def test_a_class_token_that_is_not_there_is_neither_asked_nor_dropped(kind):
    dropper = ATS(Count(5), keep_class_token=False, score="value_norm")
    for reducer, message in (
        (TopK(Ratio(0.5)), "topk needs a class token and this model has none"),
        (Stack(ToMe(Ratio(0.9)), EViT(Ratio(0.5))), "evit needs a class token and this model has none"),
        (dropper, "ats is asked to drop the class token, and this model has none.*use keep_class_token=True"),
    ):
        with pytest.raises(ReducerError, match=message):
            reduce_tokens(make_vit(kind), at(1, reducer))


def test_a_class_token_is_refused_behind_its_loss_in_the_same_block_too():
    dropper = ATS(Count(5), keep_class_token=False)
    with pytest.raises(ReducerError, match="evit at block 1 needs the class token, which ats at block 1 may have drop"):
        reduce_tokens(make_vit(), at(1, Stack(dropper, EViT(Ratio(0.5)))))
    reduce_tokens(make_vit(), at(1, Stack(EViT(Ratio(0.5)), dropper)))


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, [1, 2]), ({}, [2]), ({"embed_dim": 64}, [1]), ({"num_heads": 4}, [1]), ({"depth": 5}, [1]),
        ({"reg_tokens": 2}, [1]), ({"img_size": 64}, [1]),
    ],
)  # fmt: skip
def test_parameters_made_for_one_model_and_its_blocks_are_refused_elsewhere(change, blocks):
    reducer = dynamicvit()
    reduce_tokens(make_vit(), at(1, reducer))
    weights = [parameter.clone() for parameter in reducer.parameters()]
    with pytest.raises(ReducerError, match="has parameters for another model or other blocks"):
        reduce_tokens(make_vit(**change), at(blocks, reducer))
    reduce_tokens(make_vit(), at(1, reducer))  # the same again keeps them
    assert all((old == new).all() for old, new in zip(weights, reducer.parameters(), strict=True))


def test_a_selector_of_evit_that_does_more_than_choose_is_refused():
    for select, message in (
        (ATS(Count(4), keep_class_token=False), "must only decide, and keep the class token"),
        (build({"name": "avit"}), "must only decide, and keep the class token"),
    ):
        with pytest.raises(ReducerError, match=message):
            EViT(Ratio(0.7), select=select)


def test_a_model_without_an_image_size_has_no_grid_to_ask_for():
    model = make_vit()
    model.patch_embed.grid_size = None
    with pytest.raises(ReducerError, match="create it with img_size="):
        _ = host_of(model).grid


def test_images_are_resized_only_where_it_is_known_how_patches_are_cut(images):
    from timm.layers import PatchEmbed

    model = make_vit()
    smaller = reduce_tokens(model, at(0, build({"name": "small_input", "budget": {"count": 16}})))
    assert smaller(images).shape == (len(images), 7)
    model.patch_embed.__class__ = type("StrangeEmbed", (PatchEmbed,), {})
    with pytest.raises(ReducerError, match="whose patches come from StrangeEmbed.*dynamic_img_size=True"):
        smaller(images)


def test_blocks_that_are_no_sequence_are_refused():
    from torch import nn

    model = make_vit()
    model.blocks = nn.ModuleList(model.blocks)
    with pytest.raises(UnsupportedModel, match="holds its blocks in a ModuleList, not a Sequential"):
        reduce_tokens(model, at(0, Identity()))


def test_an_mlp_of_convolutions_is_refused_though_it_is_an_mlp():
    from timm.layers import Mlp

    model = make_vit()
    model.blocks[2].mlp = Mlp(32, 64, use_conv=True)
    with pytest.raises(UnsupportedModel, match="block 2 has the MLP Mlp, which is not known to act token by token"):
        reduce_tokens(model, at(0, Identity()))


def test_a_pool_that_knows_places_is_refused():
    from timm.layers.attention_pool import AttentionPoolLatent

    model = make_vit("map")
    model.attn_pool = AttentionPoolLatent(32, num_heads=2, feat_size=36, pos_embed="abs")
    with pytest.raises(UnsupportedModel, match="the attention pool AttentionPoolLatent is not supported"):
        reduce_tokens(model, at(0, Identity()))
    model = make_vit("map")
    model.attn_pool.__class__ = type("StrangePool", (AttentionPoolLatent,), {})
    with pytest.raises(UnsupportedModel, match="the attention pool StrangePool is not supported"):
        reduce_tokens(model, at(0, Identity()))


@pytest.mark.parametrize(
    ("check", "takes", "refuses"),
    [
        (checked_share, [0, 0.5, 1], [-0.001, 1.001, True]),
        (partial(checked_share, above=True), [1e-9, 1], [0, 0.0, 1.001]),
        (checked_weight, [0, 7.5], [-1e-9, math.inf, math.nan, "1"]),
        (partial(checked_weight, above=True), [1e-9], [0, 0.0]),
        (partial(checked_within, low=2, high=3), [2, 2.5, 3], [1.999, 3.001, None]),
        (partial(checked_within, low=2, high=3, above=True), [2.001, 3], [2, 2.0]),
        (partial(checked_within, low=2), [2, 1e300], [1.999, math.inf]),
        (partial(checked_whole, least=2), [2, 10**30], [1, 2.0, True]),
    ],
)
def test_a_setting_is_taken_up_to_its_bounds_and_refused_beyond(check, takes, refuses):
    for value in takes:
        assert check(value, "Method(setting=…)") == value
    for value in refuses:
        with pytest.raises(ReducerError, match=r"Method\(setting="):
            check(value, "Method(setting=…)")


def test_an_array_is_no_number_though_it_holds_one():
    for value in (np.array([0.5]), np.ones((1, 1)), np.array([3])):
        assert finite_number(value) is None and whole_number(value) is None
    assert finite_number(np.float32(0.5)) == 0.5 and finite_number(np.array(3)) == 3 and whole_number(np.int64(3)) == 3
