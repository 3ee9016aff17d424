"""Corners that once were wrong: each test names what must hold there."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Identity,
    RandomDrop,
    Ratio,
    ReducerError,
    Stack,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    build,
    every,
    placement_from,
    reduce_tokens,
)  # fmt: skip

from .conftest import assert_same_alone_and_in_a_batch, make_vit
from .test_evit_tome_topk import slow_evit, slow_tome


@pytest.mark.parametrize("kind", ["class", "qk_norm"])
def test_every_gradient_of_tome_and_evit_equals_the_slow_reference(kind, images):
    images = images[:2].double()
    for placement, slow in (
        (every(1, ToMe(Drop(5)), depth=4), lambda model: slow_tome(model, images, 5)),
        (at([1, 3], EViT(Ratio(0.6))), lambda model: slow_evit(model, images, 0.6, {1, 3})),
    ):
        ours, theirs = make_vit(kind).double(), make_vit(kind).double()
        reduce_tokens(ours, placement)(images).square().sum().backward()
        slow(theirs).square().sum().backward()
        for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                found.grad, expected.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_what_would_be_bypassed_is_refused():
    class LowRank(nn.Linear):
        pass

    model = make_vit()
    model.blocks[1].attn.qkv = LowRank(32, 96)
    with pytest.raises(UnsupportedModel, match="block 1 has its qkv replaced by a LowRank"):
        reduce_tokens(model, at(0, Identity()))
    for part in (lambda m: m.blocks[2], lambda m: m.blocks[2].attn, lambda m: m.blocks[2].attn.qkv):
        model = make_vit()
        part(model).register_forward_hook(lambda *a: None)
        with pytest.raises(UnsupportedModel, match="block 2 has a forward hook"):
            reduce_tokens(model, at(0, Identity()))


@pytest.mark.parametrize("kind", ["registers", "distilled"])
def test_a_dropped_class_token_beside_other_prefix_tokens(kind, images):
    dropper = ATS(Count(2), keep_class_token=False, score="value_norm")
    model = make_vit(kind).double()
    assert_same_alone_and_in_a_batch(reduce_tokens(model, at(3, dropper)), images)
    _, trace = reduce_tokens(model, at([1, 3], dropper)).trace(images.double())
    others = model.num_prefix_tokens - 1
    kept = trace.kept(3).sum(1) + trace.class_kept(3).long() + others
    assert torch.equal(trace.tokens[:, -1], kept), "registers and distillation token are never sampled"
    assert (trace.kept(3).sum(1) + trace.class_kept(3).long() >= 1).all()


def test_an_image_that_merges_nothing_is_left_as_it_is(images):
    model = make_vit().double()
    for placement in (
        at(0, ATS(Ratio(0.6))) | at(1, ToMe(Count(14))) | at(2, ToMe(Ratio(0.6))),
        at(0, EViT(Ratio(0.8), select=ATS(Count(14)))) | at(1, ToMe(Count(13))),
        at(0, ATS(Ratio(0.6))) | at(1, ToMe(Count(14))) | at(2, TopK(Count(9))),
    ):
        assert_same_alone_and_in_a_batch(reduce_tokens(model, placement), images)


class RandomDropBefore(RandomDrop):
    """Before the block's attention."""

    site = "input"


@pytest.mark.parametrize("first", [RandomDrop, RandomDropBefore])
@torch.no_grad()
def test_two_random_drops_in_one_block_are_independent(first):
    model = make_vit(depth=1)
    _, trace = reduce_tokens(model, at(0, Stack(first(Count(18)), RandomDrop(Count(9))))).trace(
        torch.randn(400, 3, 48, 48)
    )
    often = trace.kept(0).double().mean(0)
    assert (often - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize("variant", ["paper", "unsorted", "gumbel"])
def test_one_sample_point_leaves_one_token_over_and_over(variant, images):
    model = make_vit().double()
    placement = at([0, 1, 2], ATS(Count(1), variant=variant))
    assert_same_alone_and_in_a_batch(reduce_tokens(model, placement), images)
    _, trace = reduce_tokens(model, placement).trace(images.double())
    assert (trace.tokens[:, 1:] == 2).all()


def test_a_share_too_small_for_one_token_keeps_one(images):
    model = make_vit()
    _, trace = reduce_tokens(model, at([0, 1], TopK(Ratio(0.01))) | at(2, ATS(Count(4)))).trace(images)
    assert (trace.tokens[:, 1:] == 2).all()


@pytest.mark.parametrize("kind", ["class", "average", "avgmax", "map", "distilled"])
def test_images_without_any_patch_left_are_defined(kind, images):
    from reducers import Decision, TokenReducer
    from reducers.maps import keep_rows

    class DropAll(TokenReducer):
        name = "drop_all"

        def decide(self, signals, state):
            first = signals.layout.row_image == 0
            return Decision(keep_rows(signals.layout, signals.layout.is_prefix | ~first))

    after = ATS(Count(4), score="value_norm")
    driven = reduce_tokens(make_vit(kind).double(), at(1, DropAll()) | at(2, after))
    logits, trace = driven.trace(images.double())
    assert torch.isfinite(logits).all() or kind == "map"  # attention over nothing has no value
    assert torch.isfinite(logits[1:]).all()
    assert trace.kept(2)[0].sum() == 0
    if kind != "map":
        alone = driven(images[:1].double())
        torch.testing.assert_close(alone[0], logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_reference_cost_does_not_change_by_an_identity_in_the_stack(images):
    model = make_vit()
    alone = reduce_tokens(model, at(1, ATS(Count(10)))).trace(images)[1]
    for stack in (Stack(Identity(), ATS(Count(10))), Stack(ATS(Count(10)), Identity())):
        trace = reduce_tokens(model, at(1, stack)).trace(images)[1]
        assert torch.equal(trace.reference_macs, alone.reference_macs)
        assert torch.equal(trace.macs, alone.macs)


@torch.no_grad()
def test_a_score_over_the_whole_attention_map_is_paid_once(images):
    from reducers.cost_fvcore import fvcore_macs

    driven = reduce_tokens(make_vit(), at(1, TopK(Count(9), score="attention_received")))
    _, trace = driven.trace(images[:1])
    assert fvcore_macs(driven, images[:1]) == pytest.approx(float(trace.macs[0]), rel=1e-9)


@torch.no_grad()
def test_costs_are_right_from_several_threads(images):
    model = make_vit()
    expected = float(reduce_tokens(model, at([1], TopK(Count(9)))).trace(images)[1].macs[0])
    found: list[float] = []

    def run() -> None:
        with torch.no_grad():
            found.extend(
                float(reduce_tokens(model, at([1], TopK(Count(9)))).trace(images)[1].macs[0]) for _ in range(8)
            )

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 32


def test_the_distilled_head_keeps_its_dropout(images):
    model = make_vit("distilled", drop_rate=0.5).train()
    driven = reduce_tokens(model, at(0, Identity())).train()
    with torch.no_grad():
        assert not torch.equal(driven(images), driven(images))


def test_attaching_leaves_the_modes_of_the_base_alone():
    model = make_vit().train()
    model.norm.eval()
    model.blocks[0].eval()
    reduce_tokens(model, at(0, Identity()))
    assert not model.norm.training
    assert not model.blocks[0].training
    assert model.blocks[1].training


@torch.no_grad()
def test_class_attention_is_not_rounded_in_half_precision(images):
    from reducers.hosts.timm_vit import TimmCore
    from reducers.runtime.attention import PackedAttention
    from reducers.tokens import Layout

    attn = make_vit().blocks[0].attn.bfloat16()
    x = torch.randn(37, 32).bfloat16()
    core = PackedAttention(TimmCore(attn, x, Layout.alike(1, 37, 1, x.device)), None)
    q, k = core.queries()[:1].float(), core.keys.float()
    exact = ((k * q).sum(-1) * attn.scale).softmax(0)
    torch.testing.assert_close(core.row(torch.tensor([0])), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reducer", [Identity(), TopK(Ratio(0.5)), ATS(Ratio(0.5)), EViT(Ratio(0.5)), ToMe(Drop(3))])
def test_an_empty_batch_gives_no_logits(reducer, images):
    assert reduce_tokens(make_vit(), at([1, 2], reducer))(images[:0]).shape == (0, 7)


BAD = [
    lambda: ATS(0.7), lambda: TopK(0.7), lambda: EViT(0.7), lambda: ToMe(13), lambda: RandomDrop(5),
    lambda: EViT(Ratio(0.7), select=Stack(TopK(Ratio(0.5)), ATS(Ratio(0.5)))), lambda: EViT(Ratio(0.7), select="ats"),
    lambda: EViT(Ratio(0.7), fuse="no"), lambda: ATS(Ratio(0.7), keep_class_token="false"),
    lambda: ToMe(Drop(3), proportional="off"), lambda: TopK(Ratio(0.5), seed=1.5), lambda: at([3.7], Identity()),
    lambda: at([True], Identity()), lambda: at("3-5", Identity()),
    lambda: at(None, Identity()), lambda: build({"name": ["x"]}), lambda: TopK(Ratio(0.5), score=["x"]),
    lambda: build({"name": "stack", "stack": "ats"}), lambda: Stack("ats"),
    lambda: placement_from([{"at": "9-3", "reducer": {"name": "identity"}}]),
    lambda: placement_from([{"at": [], "reducer": {"name": "identity"}}]),
]  # fmt: skip


@pytest.mark.parametrize("make", BAD)
def test_bad_settings_are_refused_when_they_are_made(make):
    with pytest.raises(ReducerError):
        make()
