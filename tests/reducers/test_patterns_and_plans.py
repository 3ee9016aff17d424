"""Fixed patterns, HVT's pooling, attention back-tracking and the smaller input image."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch.nn import functional as F

from reducers import ATS, Count, Drop, EViT, Ratio, ReducerError, Stack, ToMe, TopK, at, every, reduce_tokens
from reducers.kit.back_tracking import back_track
from reducers.kit.grid import smaller_grid
from reducers.methods import BackTracking, FixedPattern, HVTPool, SmallInput
from reducers.methods.fixed_pattern import nearest_ring, radii, ring_counts
from reducers.methods.hvt_pool import max_pool, pool_windows, pooled_length
from reducers.tokens import Layout

from .conftest import assert_same_alone_and_in_a_batch, make_vit, nested_squares
from .test_evit_tome_topk import attention_parts, embed, feed_forward

NORMS = ["l1", "l2", "linf"]


@pytest.mark.parametrize("norm", NORMS)
def test_radii_order_patches_as_the_published_coordinates_do(norm):
    axis = torch.linspace(-7, 7, 14, dtype=torch.float64)
    y, x = axis[:, None].abs(), axis[None].abs()
    z = {"l1": x + y, "l2": (x**2 + y**2).sqrt(), "linf": torch.maximum(x.expand(14, 14), y.expand(14, 14))}[norm]
    ours = torch.tensor(radii((14, 14), norm), dtype=torch.float64)
    z = z.flatten()
    assert torch.equal(ours.argsort(stable=True), ((z * 1e6).round()).argsort(stable=True))
    assert ring_counts((14, 14), norm) == tuple(sorted({int((z <= r + 1e-9).sum()) for r in z}))


def test_the_nearest_ring_and_of_two_the_smaller():
    assert [nearest_ring(target, (4, 12, 24)) for target in (1, 5, 8, 9, 400)] == [4, 4, 4, 12, 24]


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_patterns_are_symmetric_nested_and_the_same_for_every_image(norm, images):
    reducer = FixedPattern(Ratio(0.6), norm=norm)
    _, trace = reduce_tokens(make_vit(), at([0, 1, 2], reducer)).trace(images)
    for square in nested_squares(trace, range(3)):
        assert int(square.sum()) in ring_counts((6, 6), norm)


@torch.no_grad()
def test_a_pattern_after_other_reducers_keeps_the_middle_of_what_is_left(images):
    model = make_vit()
    for before in (TopK(Ratio(0.7)), ATS(Ratio(0.7)), ToMe(Drop(8)), EViT(Ratio(0.7))):
        first = reduce_tokens(model, at(0, before)).trace(images)[1]
        _, trace = reduce_tokens(model, at(0, before) | at(1, FixedPattern(Count(12)))).trace(images)
        assert (trace.kept(1).sum(1) == torch.minimum(first.kept(0).sum(1), torch.tensor(12))).all()
        radius = torch.tensor(radii((6, 6), "l2"))
        for image in range(len(images)):
            survivors, kept = first.kept(0)[image], trace.kept(1)[image]
            assert (kept <= survivors).all()
            dropped = survivors & ~kept
            if dropped.any():
                assert radius[kept].max() <= radius[dropped].min()


def test_pooled_lengths_are_hvts():
    lengths = [196]
    for _ in range(4):
        lengths.append(pooled_length(lengths[-1]))
    assert lengths == [196, 97, 48, 23, 11]
    assert [pooled_length(n) for n in range(5)] == [0, 1, 2, 1, 1]


def test_pooling_is_torchs_max_pooling():
    for patches in (3, 8, 13):
        x = torch.randn(2 * (patches + 1), 5, requires_grad=True)
        layout = Layout.alike(2, patches + 1, 1, x.device)
        pooled = pool_windows(layout)
        found = pooled.new.pad(max_pool(x, pooled))
        tokens = layout.pad(x)
        expected = F.max_pool1d(tokens[:, 1:].transpose(1, 2), 3, 2).transpose(1, 2)
        assert torch.equal(found, torch.cat([tokens[:, :1], expected], dim=1))
        weights = pooled.matrix()
        torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[..., 0]))
        found.sum().backward()
        assert torch.isfinite(x.grad).all()
    constant = torch.full((9, 5), 2.5)
    layout = Layout.alike(1, 9, 1, constant.device)
    assert (max_pool(constant, pool_windows(layout)) == 2.5).all()


@torch.no_grad()
def test_pooling_on_a_vit_and_on_images_of_different_lengths(images):
    model = make_vit().double()
    for site in ("input", "attention"):
        _, trace = reduce_tokens(model, at([0, 1, 2, 3], HVTPool(site=site))).trace(images.double())
        assert trace.tokens[0].tolist() == [37, 18, 9, 4, 2]
        _, again = reduce_tokens(make_vit().double(), at([3], HVTPool(site=site))).trace(images.double())
        assert (again.owner(3)[:, :-1] >= 1).all()
        assert (again.owner(3)[:, -1] == -1).all(), "of 36 tokens the last is in no window"
    driven = reduce_tokens(model, at(0, ATS(Count(5))) | at([1, 2, 3], HVTPool()))
    assert_same_alone_and_in_a_batch(driven, images)


def test_back_tracking_by_hand():
    """Two blocks of three tokens: block 1's class token looks at token 2, which in block 0 looks at token 1."""
    second = torch.tensor([[[0.2, 0.1, 0.7], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]]])
    first = torch.tensor([[[0.8, 0.15, 0.05], [0.4, 0.3, 0.3], [0.0, 0.9, 0.1]]])
    masks = back_track([first, second], prefix=1, count=1)
    assert [mask[0].tolist() for mask in masks] == [[True, True, True], [True, False, True], [True, False, False]]
    masks = back_track([second, first], prefix=1, count=1)
    assert [mask[0].tolist() for mask in masks] == [[True, True, True], [True, True, False], [True, False, False]]


def slow_back_track(maps, count, mixing):
    """One image, index by index."""
    n = len(maps[0])
    kept, weight = [0], {0: 1.0}
    masks = [set(kept)]
    for attention in reversed(maps):
        score = [
            sum((mixing * weight[i] + 1 - mixing) * float(attention[i][j]) for i in kept) / len(kept) for j in range(n)
        ]
        top = sorted(range(1, n), key=lambda j: -score[j])[:count]
        kept = sorted(set(kept) | set(top))
        total = sum(score[j] for j in kept)
        weight = {j: score[j] / total for j in kept}
        masks.append(set(kept))
    return masks[::-1]


def test_back_tracking_equals_a_slow_reference_and_nests():
    maps = [torch.randn(3, 15, 15, dtype=torch.float64).mul(2).softmax(-1) for _ in range(5)]
    masks = back_track(maps, prefix=1, count=4, mixing=0.3)
    for image in range(3):
        expected = slow_back_track([m[image] for m in maps], 4, 0.3)
        assert [set(m[image].nonzero().squeeze(1).tolist()) for m in masks] == expected
    for earlier, later in itertools.pairwise(masks):
        assert (later <= earlier).all()


@torch.no_grad()
def test_back_tracking_runs_on_the_models_own_maps(images):
    model = make_vit().double()
    images = images.double()
    x, maps = embed(model, images), []
    for block in model.blocks:
        weights, _, y = attention_parts(block, x)
        maps.append(weights.mean(1))
        x = feed_forward(block, y)
    masks = back_track(maps, prefix=1, count=9)
    logits, trace = reduce_tokens(model, every(1, BackTracking(Count(9)), depth=4)).trace(images)
    for block in range(4):
        assert torch.equal(trace.kept(block), masks[block + 1][:, 1:])
    assert (trace.tokens[:, -1] == 1).all()
    # by masks, nothing removed: tokens outside m_{i+1} keep their old value and are never read again
    x = embed(model, images)
    for index, block in enumerate(model.blocks):
        b, t, _ = x.shape
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        readable = masks[index] if index else torch.ones_like(masks[0])
        scores = (q @ k.transpose(-2, -1) * attn.scale).masked_fill(~readable[:, None, None], -torch.inf).softmax(-1)
        y = feed_forward(block, x + attn.proj((scores @ v).transpose(1, 2).reshape(b, t, -1)))
        x = torch.where(masks[index + 1][..., None], y, x)
    torch.testing.assert_close(logits, model.forward_head(model.norm(x)), rtol=0, atol=1e-9)


@torch.no_grad()
def test_planning_is_booked_unless_left_out(images):
    model = make_vit()
    dense = reduce_tokens(model, at([], HVTPool())).trace(images)[1].macs
    booked = reduce_tokens(model, at([1], BackTracking(Count(9)))).trace(images)[1]
    free = reduce_tokens(model, at([1], BackTracking(Count(9), count_planning=False))).trace(images)[1]
    assert (booked.macs > dense).all() and (free.macs < dense).all()
    assert (booked.macs - free.macs >= 0.9 * dense).all()
    assert torch.equal(booked.kept(3), free.kept(3))
    with pytest.raises(ReducerError, match="cannot be stacked"):
        Stack(BackTracking(Count(9)), TopK(Count(4)))


@torch.no_grad()
def test_a_head_that_reads_patches_keeps_some(images):
    logits, trace = reduce_tokens(make_vit("average_with_class"), every(1, BackTracking(Count(9)), depth=4)).trace(
        images
    )
    assert (trace.kept(3).sum(1) >= 9).all()
    assert torch.isfinite(logits).all()


def test_smaller_grids_have_nearly_the_same_shape():
    assert smaller_grid((14, 14), 196) == (14, 14)
    assert smaller_grid((14, 14), 100) == (10, 10)
    assert smaller_grid((14, 14), 180) == (13, 14)
    assert smaller_grid((14, 14), 1) == (1, 1)
    rows, columns = smaller_grid((8, 16), 32)
    assert rows * columns == 32 and abs(2 * rows - columns) <= 2


@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "average"])
@torch.no_grad()
def test_a_smaller_input_is_timms_own_model_on_it(kind, images):
    model, images = make_vit(kind), images[:3]
    own = make_vit(kind, dynamic_img_size=True)
    logits, trace = reduce_tokens(model, at(0, SmallInput(Count(16)))).trace(images)
    small = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(logits, own(small), rtol=0, atol=1e-5)
    torch.testing.assert_close(reduce_tokens(own, at(0, SmallInput(Count(16))))(images), logits, rtol=0, atol=1e-5)
    assert (trace.tokens == 16 + model.num_prefix_tokens).all()
    assert torch.equal(
        reduce_tokens(model, at(0, SmallInput(Ratio(1.0))))(images), reduce_tokens(model, at([], HVTPool()))(images)
    )


@torch.no_grad()
def test_the_cost_of_a_smaller_input_is_that_of_the_smaller_model():
    model = timm.create_model("deit_tiny_patch16_224").eval()
    smaller = timm.create_model("deit_tiny_patch16_224", img_size=160).eval()
    found = reduce_tokens(model, at(0, SmallInput(Count(100)))).cost(torch.randn(1, 3, 224, 224))
    expected = reduce_tokens(smaller, at([], HVTPool())).cost(torch.randn(1, 3, 160, 160))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_provenance_is_told_in_the_original_patches(images):
    _, trace = reduce_tokens(make_vit(), at(0, SmallInput(Count(9))) | at(2, TopK(Count(4)))).trace(images)
    owner = trace.owner(0)[0].view(6, 6)
    assert torch.equal(owner, torch.tensor([[1 + 3 * (r // 2) + c // 2 for c in range(6)] for r in range(6)]))
    assert trace.kept(0)[0].sum() == 9
    assert (trace.kept(2).sum(1) == 4).all()
    assert (trace.kept(2) <= (trace.owner(2) >= 0)).all()
    assert ((trace.owner(2) >= 0).sum(1) == 16).all(), "each small patch covers four original ones"
