"""EViT, ToMe and top-K against slow references written from the specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from reducers import Count, Drop, EViT, RandomDrop, Ratio, ToMe, TopK, at, every, reduce_tokens

from .conftest import make_vit


def attention_parts(block, x, log_size=None):
    """(B, T, D) -> attention map (B, H, T, T), keys (B, H, T, d), features after the attention residual."""
    attn = block.attn
    b, t, _ = x.shape
    q, k, v = attn.qkv(block.norm1(x)).reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = q @ k.transpose(-2, -1) * attn.scale
    if log_size is not None:
        logits = logits + log_size[:, None, None, :]
    weights = logits.softmax(-1)
    out = attn.norm((weights @ v).transpose(1, 2).reshape(b, t, -1))
    return weights, k, x + block.ls1(attn.proj(out))


def feed_forward(block, y):
    return y + block.ls2(block.mlp(block.norm2(y)))


def embed(model, images):
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def slow_evit(model, images, rate, blocks, fuse=True):
    """One image at a time, tokens as Python lists."""
    logits = []
    for image in images:
        x = embed(model, image[None])
        for index, block in enumerate(model.blocks):
            weights, _, y = attention_parts(block, x)
            if index in blocks:
                prefix = model.num_prefix_tokens
                a = weights[0, :, 0, prefix:].mean(0)
                k = math.ceil(round(rate * len(a), 9))
                if k < len(a):
                    ranked = sorted(range(len(a)), key=(-a).tolist().__getitem__)
                    rows = [y[0, i] for i in range(prefix)] + [y[0, prefix + j] for j in ranked[:k]]
                    if fuse:
                        rows.append(sum(a[j] * y[0, prefix + j] for j in ranked[k:]))
                    y = torch.stack(rows)[None]
            x = feed_forward(block, y)
        logits.append(model.forward_head(model.norm(x)))
    return torch.cat(logits)


def slow_tome(model, images, r, proportional=True):
    """One image at a time; merges pair by pair."""
    logits = []
    prefix = model.num_prefix_tokens
    for image in images:
        x = embed(model, image[None])
        size = torch.ones(x.shape[1], dtype=x.dtype)
        for block in model.blocks:
            log_size = size.log()[None] if proportional else None
            _, keys, y = attention_parts(block, x, log_size)
            metric = F.normalize(keys[0].mean(0), dim=-1).detach()
            t = metric.shape[0]
            pairs = []
            for a in range(0, t, 2):
                options = [(float(metric[a] @ metric[b]), b) for b in range(1, t, 2) if b >= prefix]
                if a >= prefix and options:
                    best = max(options, key=lambda option: option[0])
                    pairs.append((best[0], a, best[1]))
            pairs = sorted(pairs, key=lambda pair: -pair[0])[: min(r, (t - prefix) // 2)]
            groups = {i: [i] for i in range(t)}
            for _, a, b in pairs:
                groups[b].append(a)
            merged = {a for _, a, _ in pairs}
            order = list(range(prefix))
            order += [i for i in range(0, t, 2) if i >= prefix and i not in merged]
            order += [i for i in range(1, t, 2) if i >= prefix]
            rows = [sum(size[i] * y[0, i] for i in groups[o]) / sum(size[i] for i in groups[o]) for o in order]
            size = torch.stack([sum(size[i] for i in groups[o]) for o in order])
            x = feed_forward(block, torch.stack(rows)[None])
        logits.append(model.forward_head(model.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize("kind", ["class", "registers", "qk_norm"])
@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_evit_equals_the_slow_reference(kind, fuse, images):
    model = make_vit(kind).double()
    expected = slow_evit(model, images.double(), 0.6, {1, 3}, fuse)
    found = reduce_tokens(model, at([1, 3], EViT(Ratio(0.6), fuse=fuse)))(images.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["class", "registers", "qk_norm", "no_qkv_bias"])
@pytest.mark.parametrize("r", [3, 7, 30])
@torch.no_grad()
def test_tome_equals_the_slow_reference(kind, r, images):
    model = make_vit(kind).double()
    expected = slow_tome(model, images[:4].double(), r)
    found = reduce_tokens(model, every(1, ToMe(Drop(r)), depth=4))(images[:4].double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_tome_without_proportional_attention(images):
    model = make_vit().double()
    expected = slow_tome(model, images[:4].double(), 5, proportional=False)
    found = reduce_tokens(model, every(1, ToMe(Drop(5), proportional=False), depth=4))(images[:4].double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_topk_equals_evit_without_fusion_at_equal_counts(images):
    model = make_vit().double()
    by_topk = reduce_tokens(model, at(1, TopK(Count(20))) | at(3, TopK(Count(9))))(images.double())
    by_evit = reduce_tokens(model, at(1, EViT(Count(20), fuse=False)) | at(3, EViT(Count(9), fuse=False)))(
        images.double()
    )
    torch.testing.assert_close(by_topk, by_evit, rtol=0, atol=0)


@torch.no_grad()
def test_ties_go_to_the_lower_index():
    model = make_vit()
    with torch.no_grad():
        model.pos_embed.zero_()
    flat = torch.full((1, 3, 48, 48), 0.5)  # all patches alike, so all scores are
    _, trace = reduce_tokens(model, at(0, TopK(Count(5)))).trace(flat)
    assert trace.kept(0)[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_identical_tokens_in_opposite_sets_merge_first(images):
    model = make_vit()
    twin = images[:1].clone()
    twin[..., :8, 8:16] = twin[..., :8, :8]  # patches 0 and 1 show the same …
    with torch.no_grad():
        model.pos_embed[:, 2] = model.pos_embed[:, 1]  # … at the same position
    _, trace = reduce_tokens(model, at(0, ToMe(Drop(1)))).trace(twin)
    owner = trace.owner(0)[0]
    assert owner[0] == owner[1]
    assert trace.tokens[0].tolist() == [37, 36, 36, 36, 36]


@torch.no_grad()
def test_random_drop_keeps_each_patch_equally_often_and_nests():
    model = make_vit(depth=2)
    images = torch.randn(400, 3, 48, 48)
    _, trace = reduce_tokens(model, at(0, RandomDrop(Count(12))) | at(1, RandomDrop(Count(4)))).trace(images)
    kept = trace.kept(0).double().mean(0)
    assert (kept - 12 / 36).abs().max() < 5 * math.sqrt((1 / 3) * (2 / 3) / 400)
    assert (trace.kept(1) <= trace.kept(0)).all()
    _, other = reduce_tokens(model, at(0, RandomDrop(Count(12), seed=1))).trace(images)
    assert not torch.equal(other.kept(0), trace.kept(0))


@torch.no_grad()
def test_tome_says_when_a_budget_asks_for_more_than_half(images, caplog):
    _, trace = reduce_tokens(make_vit(), at(0, ToMe(Drop(30)))).trace(images)
    assert trace.tokens[0, 1] == 19
    assert "at most half" in caplog.text


@torch.no_grad()
def test_evit_fuses_what_another_reducer_left(images):
    model = make_vit()
    from reducers import ATS

    _, alone = reduce_tokens(model, at(1, ATS(Count(20)))).trace(images)
    _, fused = reduce_tokens(model, at(1, EViT(Count(20), select=ATS(Count(20))))).trace(images)
    assert torch.equal(fused.kept(1), alone.kept(1))
    assert torch.equal(fused.tokens[:, 2], alone.tokens[:, 2] + 1)
    _, capped = reduce_tokens(model, at(1, EViT(Count(6), select=ATS(Count(20))))).trace(images)
    assert (capped.kept(1).sum(1) == 6).all()
    assert (capped.kept(1) <= alone.kept(1)).all()
