"""Embeddings and dense maps of reduced models, against timm's own and against restoring by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Identity,
    Placement,
    Ratio,
    ReducerError,
    ToMe,
    TopK,
    at,
    build,
    every,
    reduce_tokens,
)  # fmt: skip
from reducers.restore import Restorer

from .conftest import DEPTH, KINDS, make_vit

RULES = ("owner", "zero", "last")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_reduction_features_are_timms_by_every_rule(kind: str, images: Tensor) -> None:
    model, images = make_vit(kind).double(), images.double()
    tokens = model.forward_features(images)
    for placement in (Placement(), at(range(DEPTH), Identity()), at([1, 3], TopK(Ratio(1.0), score="value_norm"))):
        fast = reduce_tokens(model, placement)
        torch.testing.assert_close(
            fast.features(images), model.forward_head(tokens, pre_logits=True), rtol=0, atol=1e-9
        )
        for rule in RULES:
            patches = tokens[:, model.num_prefix_tokens :]
            torch.testing.assert_close(fast.features(images, restore=rule), patches, rtol=0, atol=1e-9)
            torch.testing.assert_close(fast.forward_features(images, restore=rule), tokens, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "average", "map", "qk_norm"])
@torch.no_grad()
def test_the_embedding_is_what_the_classifier_reads(kind: str, images: Tensor) -> None:
    model = make_vit(kind).double()
    fast = reduce_tokens(model, at([1, 3], ToMe(Drop(6))))
    heads = [model.head, model.head_dist] if kind == "distilled" else [model.head]
    read: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, given: read.append(given[0])) for head in heads]
    fast(images.double())
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(fast.features(images.double()), torch.stack(read).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["class", "distilled", "average", "map"])
@torch.no_grad()
def test_a_model_without_a_classifier_runs_and_is_traced(kind: str, images: Tensor) -> None:
    model = make_vit(kind, num_classes=0)
    fast = reduce_tokens(model, at([1, 3], ToMe(Drop(4))))
    found, trace = fast.trace(images)
    assert torch.equal(found, fast.features(images)) and found.shape == (5, 32)
    assert torch.equal(fast(images), found) and trace.tokens[0, -1] == trace.tokens[0, 0] - 8
    whole = make_vit(kind)
    gap = reduce_tokens(whole, at([1, 3], ToMe(Drop(4)))).trace(images)[1].macs - trace.macs
    assert set(gap.tolist()) == {32.0 * 7 * (2 if kind == "distilled" else 1)}, "all but the classifier is counted"


@pytest.mark.parametrize(
    "reducer", [ToMe(Drop(9)), EViT(Ratio(0.5)), build({"name": "pitome", "budget": {"ratio": 0.6}})]
)
@torch.no_grad()
def test_where_nothing_is_dropped_each_patch_shows_the_token_that_carries_it(
    reducer: nn.Module, images: Tensor
) -> None:
    fast = reduce_tokens(make_vit().double(), at([1, 2], reducer))
    images = images.double()
    owner, maps = fast.trace(images)[1].owner(DEPTH - 1), [fast.features(images, restore=rule) for rule in RULES]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    left: list[Tensor] = []
    hook = fast.base.norm.register_forward_hook(lambda _, given, out: left.append(out))
    fast(images)
    hook.remove()
    rows = left[-1].view(len(images), -1, 32)
    for image in range(len(images)):
        torch.testing.assert_close(maps[0][image], rows[image][owner[image]], rtol=0, atol=1e-12)
    assert len(set(owner[0].tolist())) < 36


@torch.no_grad()
def test_a_dropped_patch_is_zero_or_what_entered_the_block_that_dropped_it(images: Tensor) -> None:
    model, images = make_vit().double(), images.double()
    fast = reduce_tokens(model, at(1, ATS(Ratio(0.5))) | at(3, TopK(Ratio(0.5))))
    trace = fast.trace(images)[1]
    first, second = (trace.owner(block) >= 0 for block in (1, 3))
    zero, last = fast.features(images, restore="zero"), fast.features(images, restore="last")
    assert len(set(second.sum(1).tolist())) > 1, "images keep different numbers"
    assert torch.equal(zero[second], last[second]) and not zero[~second].any() and zero[second].abs().min() > 0
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    entered = model.norm(model.blocks[0](x))[:, 1:]
    torch.testing.assert_close(last[~first], entered[~first], rtol=0, atol=1e-9)
    entering: list[Tensor] = []
    hook = model.blocks[3].norm1.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    fast(images)
    hook.remove()
    rows = model.norm(entering[0])
    for image, starts in enumerate((trace.tokens[:, 3].cumsum(0) - trace.tokens[:, 3]).tolist()):
        gone = first[image] & ~second[image]
        torch.testing.assert_close(last[image][gone], rows[starts + trace.owner(2)[image][gone]], rtol=0, atol=1e-9)


@torch.no_grad()
def test_an_image_alone_has_the_map_it_has_in_a_batch(images: Tensor) -> None:
    images = images.double()
    for reducer, rules in ((ATS(Ratio(0.4)), RULES[1:]), (ToMe(Drop(7)), RULES)):
        fast = reduce_tokens(make_vit("registers").double(), at([0, 2], reducer))
        for rule in rules:
            together = fast.features(images, restore=rule)
            for i in range(len(images)):
                alone = fast.features(images[i : i + 1], restore=rule)
                torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(fast.features(images)[1], fast.features(images[1:2])[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_smaller_input_is_restored_to_the_grid_of_the_image_it_was(images: Tensor) -> None:
    fast = reduce_tokens(make_vit(), at(0, build({"name": "small_input", "budget": {"count": 9}})))
    found = fast.features(images, restore="owner").view(5, 6, 6, -1)
    assert torch.equal(found[:, 0::2, 0::2], found[:, 1::2, 1::2]) and not torch.equal(found[:, 0, 0], found[:, 2, 0])


def test_gradients_reach_the_patches_that_were_dropped_by_the_rule_that_shows_them(images: Tensor) -> None:
    fast = reduce_tokens(make_vit().double(), at(1, TopK(Ratio(0.3))))
    images = images[:2].double().requires_grad_()
    gone = fast.trace(images)[1].owner(3) < 0
    fast.features(images, restore="last")[gone].square().sum().backward()
    assert images.grad is not None and torch.isfinite(images.grad).all() and images.grad.any()


@torch.no_grad()
def test_what_a_rule_cannot_answer_is_refused_with_the_rules_that_can(images: Tensor) -> None:
    fast = reduce_tokens(make_vit(), at(1, ToMe(Drop(3))) | at(2, TopK(Ratio(0.5))))
    for ask in (fast.features, fast.forward_features):
        with pytest.raises(ReducerError, match=r'topk at block 2 drops patches.*use restore="zero".*restore="last"'):
            ask(images, restore="owner")
    with pytest.raises(ReducerError, match="topk at block 2"):
        fast.forward_features(images)
    with pytest.raises(ReducerError, match=r"restore='nearby': choose one of owner, zero, last"):
        fast.features(images, restore="nearby")
    halting = reduce_tokens(make_vit(), every(1, build({"name": "avit"}), start=1))
    assert halting.features(images).shape == (5, 32)
    with pytest.raises(ReducerError, match="avit ends with an output of its own, whose tokens have no places"):
        halting.features(images, restore="zero")
    dropper = reduce_tokens(make_vit(), at(1, ATS(Count(5), keep_class_token=False)))
    assert dropper.features(images, restore="zero").shape == (5, 36, 32)
    with pytest.raises(ReducerError, match="an image has lost its class token"):
        dropper.forward_features(images, restore="zero")


def test_rules_are_asked_by_name_alone() -> None:
    for wrong in (None, 3, "Owner"):
        with pytest.raises(ReducerError, match="choose one of"):
            Restorer(wrong)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_dense_pooling_is_restored_by_the_largest_weight(images: Tensor) -> None:
    fast = reduce_tokens(make_vit(), at(1, build({"name": "patch_merger", "budget": {"count": 6}})))
    assert fast.features(images, restore="zero").shape == (5, 36, 32)
    assert fast(images[:0]).shape == (0, 7) and fast.features(images[:0], restore="owner").shape == (0, 36, 32)
