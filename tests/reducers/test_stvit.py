"""STViT: semantic tokens against a slow reference, the published cost, and what replaces the identity."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from reducers import ATS, Count, Ratio, ReducerError, Stack, ToMe, TopK, at, reduce_tokens
from reducers.budget import Drop
from reducers.hosts.timm_vit import TimmBlock
from reducers.kit.semantic import bins, pool_grid
from reducers.methods import DynamicViT, KMedoids, STViT
from reducers.runtime.cross import cross_block

from .conftest import KINDS, make_vit
from .test_evit_tome_topk import attention_parts, embed, feed_forward


def edges(patches: int, pooled: int) -> list[tuple[int, int]]:
    """Adaptive pooling: a bin starts at the floor and ends at the ceiling."""
    return [(i * patches // pooled, math.ceil((i + 1) * patches / pooled)) for i in range(pooled)]


@pytest.mark.parametrize(("grid", "shape"), [((14, 14), (4, 4)), ((6, 6), (6, 6)), ((5, 7), (2, 3)), ((3, 4), (1, 1))])
def test_pooling_takes_the_largest_of_each_bin(grid, shape):
    x = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    pooled, shares = pool_grid(x, grid, shape), bins(grid, shape, x.device)
    square = x.view(2, *grid, 3)
    inside = torch.zeros(shape[0] * shape[1], *grid)
    for i, (top, bottom) in enumerate(edges(grid[0], shape[0])):
        for j, (left, right) in enumerate(edges(grid[1], shape[1])):
            number = i * shape[1] + j
            assert torch.equal(pooled[:, number], square[:, top:bottom, left:right].amax((1, 2)))
            inside[number, top:bottom, left:right] = 1
    inside = inside.flatten(1)
    torch.testing.assert_close(shares, inside / inside.sum(0))
    torch.testing.assert_close(shares.sum(0), torch.ones(grid[0] * grid[1]))


def test_a_constant_map_pools_to_constant_tokens():
    x = torch.randn(1, 1, 8).expand(2, 196, 8)
    assert torch.equal(pool_grid(x, (14, 14), (4, 4)), x[:, :16])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_asking_oneself_is_the_plain_block(kind):
    """Layer 2 with its centres at 0 and the semantic tokens alone as keys."""
    model = make_vit(kind).double()
    x = torch.randn(3, 11, 32, dtype=torch.float64)
    for block in model.blocks:
        torch.testing.assert_close(cross_block(TimmBlock(block), x, x), block(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_as_many_tokens_as_patches_that_ask_the_patches_alone_are_the_plain_model(kind, images):
    plain = make_vit(kind).double()
    for block in range(4):
        driven = reduce_tokens(plain, at(block, STViT(Count(36), pooled_keys=False)))
        torch.testing.assert_close(driven(images.double()), plain(images.double()), rtol=0, atol=1e-10)


def slow_cross(block, asking, asked, residual):
    """One image: each query row by itself. (Q, D), (K, D) -> (Q, D)"""
    attn, rows = block.attn, []
    qkv = attn.qkv.weight.split(attn.attn_dim), attn.qkv.bias.split(attn.attn_dim)
    q, k, v = (
        F.linear(block.norm1(x), w, b).view(len(x), attn.num_heads, -1)
        for x, w, b in zip((asking, asked, asked), *qkv, strict=True)
    )
    q, k = attn.q_norm(q), attn.k_norm(k)
    for i in range(len(asking)):
        heads = []
        for h in range(attn.num_heads):
            weights = torch.stack([q[i, h] @ key for key in k[:, h]]) * attn.scale
            heads.append(weights.softmax(0) @ v[:, h])
        rows.append(attn.norm(torch.cat(heads)))
    y = residual + block.ls1(attn.proj(torch.stack(rows)))
    return feed_forward(block, y[None])[0]


def slow_stvit(model, image, centre, *, query, pooled_keys, residual):
    """Blocks 1 and 2 of four."""
    x = embed(model, image[None])
    x = feed_forward(model.blocks[0], attention_parts(model.blocks[0], x)[2])[0]
    prefix = model.num_prefix_tokens
    lead, patches = x[: prefix if query else 0], x[prefix:]
    bounds = edges(6, 3)
    square = patches.view(6, 6, -1)
    pooled = torch.stack([square[a:b, c:d].amax((0, 1)) for a, b in bounds for c, d in bounds])
    asked = torch.cat([lead, pooled, patches] if pooled_keys else [lead, patches])
    kept = torch.cat([lead, pooled if residual else torch.zeros_like(pooled)])
    first = slow_cross(model.blocks[1], torch.cat([lead, pooled]), asked, kept)
    asking = torch.cat([first[: len(lead)], first[len(lead) :] + centre])
    x = slow_cross(model.blocks[2], asking, torch.cat([first, patches]), asking)[None]
    x = model.norm(feed_forward(model.blocks[3], attention_parts(model.blocks[3], x)[2]))
    return model.forward_head(x) if query else model.head(x.mean(1))


@pytest.mark.parametrize("kind", ["class", "qk_norm", "registers"])
@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize(("pooled_keys", "residual"), [(True, True), (False, True), (True, False)])
@torch.no_grad()
def test_stvit_equals_a_slow_reference(kind, query, pooled_keys, residual, images):
    model = make_vit(kind).double()
    reducer = STViT(Count(9), class_token="query" if query else "pool", pooled_keys=pooled_keys, residual=residual)
    if kind == "registers" and not query:
        with pytest.raises(ReducerError, match="5 prefix tokens"):
            reduce_tokens(model, at([1, 2], reducer))
        return
    driven = reduce_tokens(model, at([1, 2], reducer))
    centre = reducer.centres["2"].normal_()
    found = driven(images.double())
    for i in range(len(images)):
        expected = slow_stvit(
            model, images[i].double(), centre, query=query, pooled_keys=pooled_keys, residual=residual
        )
        torch.testing.assert_close(found[i], expected[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("reading", "counts", "kept"), [("query", [197] * 3 + [17] * 4, True), ("pool", [197] * 3 + [16] * 4, False)]
)
@torch.no_grad()
def test_sixteen_tokens_are_left_and_carry_every_patch(reading, counts, kept):
    model = make_vit(img_size=112, depth=6)
    driven = reduce_tokens(model, at([2, 3], STViT(class_token=reading)))
    logits, trace = driven.trace(torch.randn(2, 3, 112, 112))
    assert torch.isfinite(logits).all()
    assert trace.tokens[0].tolist() == counts
    lead = 1 if kept else 0
    for block in range(2, 6):
        assert (trace.class_kept(block) == kept).all()
        assert not trace.kept(block).any(), "no semantic token is one patch's continuation"
        owner = trace.owner(block)[0].view(14, 14) - lead
        for number, (top, bottom, left, right) in enumerate(
            (*rows, *columns) for rows in edges(14, 4) for columns in edges(14, 4)
        ):
            inside = torch.zeros(14, 14, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert inside[owner == number].all()
            assert (owner == number).any()


PUBLISHED = {"tiny": 0.525, "small": 1.915, "base": 7.294}
WITH_CLASS_TOKEN = {"tiny": 0.530, "small": 1.935, "base": 7.371}


@pytest.mark.parametrize("size", PUBLISHED)
@torch.no_grad()
def test_the_published_costs(size):
    """The table counts a class token in the first blocks, and none among the semantic ones."""
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224")
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    image = torch.zeros(1, 3, 224, 224)
    published = STViT(class_token="pool", pooled_keys=False)
    for reducer, gmacs in ((published, PUBLISHED[size]), (STViT(), WITH_CLASS_TOKEN[size])):
        driven = reduce_tokens(model, at([4, 5], reducer))
        assert float(driven.cost(image)) / 1e9 == pytest.approx(gmacs, abs=5.01e-4)
    logits, trace = driven.trace(image)
    assert logits.shape == (1, 1000)
    assert torch.equal(trace.macs, trace.reference_macs)
    dense = reduce_tokens(model, at([], STViT())).cost(image)
    assert 0.57 < 1 - float(trace.macs / dense) < 0.59


def test_gradients_reach_the_centres_and_all_that_was_pooled(images):
    reducer = STViT(Count(4))
    model = reduce_tokens(make_vit(), at([0, 1, 2], reducer)).train()
    assert sorted(reducer.centres) == ["1", "2"]
    assert all(0 < centre.detach().std().item() < 0.04 for centre in reducer.centres.values())
    images = images.requires_grad_()
    model(images).square().sum().backward()
    for centre in reducer.centres.values():
        assert centre.grad.isfinite().all() and centre.grad.abs().sum(1).min() > 0
    assert (images.grad[:4].abs().sum((1, 2, 3)) > 0).all()


@torch.no_grad()
def test_a_grid_that_is_no_square():
    model = make_vit(img_size=(48, 96))
    _, trace = reduce_tokens(model, at([1, 2], STViT())).trace(torch.randn(2, 3, 48, 96))
    assert trace.tokens[0].tolist() == [73, 73, 16, 16, 16], "3 x 5 of 6 x 12"


@pytest.mark.parametrize("budget", [Count(9), Ratio(0.25)])
@torch.no_grad()
def test_a_larger_image_leaves_as_many_tokens(budget):
    """M is the model's, whatever the image's size; two layers agree on it."""
    driven = reduce_tokens(make_vit(dynamic_img_size=True), at([1, 2], STViT(budget)))
    for size in ((48, 48), (96, 96), (80, 48)):
        logits, trace = driven.trace(torch.randn(2, 3, *size))
        assert torch.isfinite(logits).all()
        assert trace.tokens[0].tolist() == [size[0] * size[1] // 64 + 1] * 2 + [10] * 3


@torch.no_grad()
def test_what_comes_before_is_refused_and_what_comes_after_runs(images):
    model = make_vit()
    for before in (TopK(Ratio(0.9)), ATS(Ratio(0.9)), ToMe(Drop(2))):
        with pytest.raises(ReducerError, match="place other reducers after it"):
            reduce_tokens(model, at(0, before) | at([1, 2], STViT()))(images)
    with pytest.raises(ReducerError, match="after its last block"):
        reduce_tokens(model, at([0, 2], STViT()) | at(1, TopK(Ratio(0.5))))(images)
    masked = reduce_tokens(model, at([0, 2], STViT()) | at(1, DynamicViT(Ratio(0.5)))).train()
    with pytest.raises(ReducerError, match="removed or masked some"):
        masked(images)
    for first in ([0], [0, 1]):  # the attention that tokens received is another sequence's
        with pytest.raises(ReducerError, match=r"not next to a method that replaces the block's attention \(stvit\)"):
            reduce_tokens(model, at(first, STViT(Count(9))) | at(first[-1] + 1, KMedoids(Count(4))))(images)
    with pytest.raises(ReducerError, match="cannot be stacked"):
        Stack(STViT(), TopK(Ratio(0.5)))
    _, trace = reduce_tokens(model, at([0, 1], STViT(Count(9))) | at(2, ToMe(Drop(3)))).trace(images)
    assert trace.tokens[0].tolist() == [37, 10, 10, 7, 7]
    with pytest.raises(ReducerError, match="class_token='query'"):
        reduce_tokens(model, at([0, 1], STViT(class_token="pool")) | at(2, TopK(Ratio(0.5))))
    with pytest.raises(ReducerError, match=r"stvit is asked to drop .* has none .*; use class_token='query'"):
        reduce_tokens(make_vit("average"), at([0, 1], STViT(class_token="pool")))


@pytest.mark.parametrize("setting", ["class_token", "pooled_keys", "residual"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ReducerError, match=setting):
        STViT(**{setting: "perhaps"})
