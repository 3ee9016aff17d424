"""A-ViT against the published masked form, written from the specification."""

from __future__ import annotations

import math

import pytest
import torch

from ablations.measure.finetune.objective import Objective, TrainingViT
from reducers import ATS, Drop, Ratio, ReducerError, Stack, ToMe, TopK, at, build, reduce_tokens
from reducers.kit.halting import halt, halting_score
from reducers.methods import AViT
from reducers.methods.avit import depth_prior, prior_penalty, published_constants
from tests.finetune.conftest import recipe_of

from .conftest import DEPTH, assert_same_alone_and_in_a_batch, make_vit
from .test_evit_tome_topk import embed, feed_forward

LATER = range(1, DEPTH)
HALTING = {"gamma": 2.0, "beta": -1.0}  # the feature 0 of the random models then halts tokens everywhere


def masked_attention(block, x, mask):
    """x (B, T, D) after the attention residual; keys where ``mask`` (B, T) is 0 are as good as not there."""
    attn = block.attn
    b, t, _ = x.shape
    normed = block.norm1(x) * mask[..., None]
    q, k, v = attn.qkv(normed).reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    logits = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale - 1000 * (1 - mask[:, None, None])
    out = attn.norm((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))
    return x + block.ls1(attn.proj(out))


def masked_avit(model, images, *, gamma, beta, epsilon=0.01):
    """Every token in every block, halted ones masked: outputs (B, T, D), rho (B, T), weights, mean scores, tokens."""
    x = embed(model, images)
    c, rho = torch.zeros_like(x[..., 0]), torch.zeros_like(x[..., 0])
    r, m, total = torch.ones_like(c), torch.ones_like(c), torch.zeros_like(c)
    out, means, tokens = torch.zeros_like(x), [], []
    prefix = model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        tokens.append(m.sum(1))
        x = x * m[..., None]
        x = feed_forward(block, masked_attention(block, x, m)) * m[..., None]
        h = torch.sigmoid(gamma * x[..., 0] + beta)
        means.append((h * m)[:, prefix:].mean())
        if index == len(model.blocks) - 1:
            h = torch.ones_like(h)
        c, rho = c + h * m, rho + m
        reached = ((c >= 1 - epsilon) & (m > 0)).to(x.dtype)
        going = m - reached
        out = out + (reached * r + going * h)[..., None] * x
        total = total + reached * r + going * h
        rho = rho + reached * r
        r = r - going * h
        m = going
    return out, rho, total, torch.stack(means), torch.stack(tokens, dim=1)


def observed(reducer, images, *, kind="class", blocks=LATER):
    model = TrainingViT(make_vit(kind).double(), at(blocks, reducer)).train()
    outputs, state = model.observed(images.double())
    return model, outputs, state


@pytest.mark.parametrize("blocks", [LATER, range(DEPTH)], ids=["later", "all"])
def test_training_on_the_tokens_that_are_there_is_the_masked_form(blocks, images):
    """Logits, losses and every gradient."""
    reducer = AViT(**HALTING, ponder=0.3, prior=0.7)
    model, outputs, state = observed(reducer, images, blocks=blocks)
    parts = reducer.losses(state, outputs, torch.arange(5), None)
    loss = outputs.logits.square().sum() + parts["ponder"] + parts["prior"]
    found = torch.autograd.grad(loss, list(model.base.parameters()))

    out, rho, total, means, tokens = masked_avit(model.base, images.double(), **HALTING)
    logits = model.base.forward_head(model.base.norm(out))
    assert tokens[:, -1].min() < tokens[:, 1].min() < 37, "some halt early, some late"
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(outputs.logits, logits, rtol=0, atol=1e-9)
    t = [math.exp(-0.5 * (block - 8) ** 2) for block in range(DEPTH)]
    t = [0.98 * value / sum(t) for value in t]  # all four blocks lie before the eighth
    p = (means / means.sum()).clamp(0.01, 0.99)
    penalty = sum(wanted * (math.log(wanted) - share.log()) for wanted, share in zip(t, p, strict=True)) / DEPTH
    torch.testing.assert_close(parts["ponder"], 0.3 * rho.mean())
    torch.testing.assert_close(parts["prior"], 0.7 * penalty.clamp(min=0))
    expected = torch.autograd.grad(
        logits.square().sum() + 0.3 * rho.mean() + 0.7 * penalty.clamp(min=0), list(model.base.parameters())
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_inference_gives_the_same_and_ends_an_image_with_its_class_token(images):
    base = make_vit().double()
    logits, trace = reduce_tokens(base, at(LATER, AViT(**HALTING))).trace(images.double())
    out, rho, _, _, tokens = masked_avit(base, images.double(), **HALTING)
    torch.testing.assert_close(logits, base.forward_head(base.norm(out)), rtol=0, atol=1e-9)
    lives = (rho[:, 0].ceil() - 1).long().tolist()  # blocks the class token passes: rho = N + r with 0 < r <= 1
    assert min(lives) < DEPTH
    for image, blocks in enumerate(lives):
        left = trace.tokens[image, 1:].tolist()
        assert left[:blocks] == tokens[image, :blocks].tolist()
        assert left[blocks:] == [0] * (DEPTH - blocks)


@pytest.mark.parametrize("kind", ["average", "avgmax"])
@torch.no_grad()
def test_a_head_that_reads_the_patches_gets_every_tokens_output(kind, images):
    reducer = AViT(**HALTING)
    model, outputs, _ = observed(reducer, images, kind=kind)
    out = masked_avit(model.base, images.double(), **HALTING)[0]
    torch.testing.assert_close(outputs.batch.x.view_as(out), out, rtol=0, atol=1e-9)
    expected = model.base.eval().forward_head(model.base.norm(out))
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.eval()(images.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "average_with_class", "map", "qk_norm"])
@pytest.mark.parametrize("blocks", [LATER, [1, 3], [2]], ids=str)
@torch.no_grad()
def test_inference_and_training_agree_and_weights_sum_to_one(kind, blocks, images):
    reducer = AViT(**HALTING)
    model, outputs, state = observed(reducer, images, kind=kind, blocks=blocks)
    torch.testing.assert_close(model.eval()(images.double()), outputs.logits, rtol=0, atol=1e-9)
    sums = state.plans[reducer].sums
    assert not sums.running.any()
    assert 1 <= float(sums.ponder) / sums.home.rows <= DEPTH + 1
    assert [block for block, _ in sums.scores] == [*(block - 1 for block in blocks), DEPTH - 1]


@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "average"])
@torch.no_grad()
def test_a_very_low_beta_is_the_plain_model(kind, images):
    plain = make_vit(kind).double()
    logits, trace = reduce_tokens(plain, at(LATER, AViT(beta=-1e4))).trace(images.double())
    torch.testing.assert_close(logits, plain(images.double()), rtol=0, atol=1e-10)
    assert (trace.tokens == trace.tokens[:, :1]).all()


@torch.no_grad()
def test_everybody_may_halt_after_the_first_block(images):
    base = make_vit()
    logits, trace = reduce_tokens(base, at(LATER, AViT(gamma=0, beta=20))).trace(images)
    assert trace.tokens.tolist() == [[37, 37, 0, 0, 0]] * 5
    batch = base.blocks[0](embed(base, images))
    torch.testing.assert_close(logits, base.forward_head(base.norm(batch)))
    _, dense = reduce_tokens(base, at([], AViT())).trace(images)
    rest = base.patch_embed.proj.weight.numel() * 36 + base.head.weight.numel()
    one_block = (dense.macs - rest) / DEPTH
    torch.testing.assert_close(trace.macs - trace.reducer_macs, rest + one_block)
    assert (trace.owner(3) == -1).all()
    alone = reduce_tokens(base, at(LATER, AViT(gamma=0, beta=20)))(images[:1])
    torch.testing.assert_close(alone, logits[:1], rtol=0, atol=1e-5)


def test_the_training_goes_on_where_every_token_has_halted(images):
    reducer = AViT(gamma=0, beta=20, ponder=1.0)
    model = TrainingViT(make_vit(), at(LATER, reducer)).train()
    parts = Objective(recipe_of(smoothing=0.0), None, classes=7).parts(model, images, torch.arange(5))
    torch.stack(list(parts.values())).sum().backward()
    assert float(parts["avit.ponder"].detach()) == pytest.approx(2.0), "one block, and all of the remainder"
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_step_halts_at_exactly_one_minus_epsilon_and_gives_the_remainder():
    c = torch.tensor([0.5, 0.5, 0.5, 0.0], dtype=torch.float64)
    running = torch.tensor([True, True, True, False])
    score = torch.tensor([0.25, 0.24, 0.9, 0.9], dtype=torch.float64)
    done = halt(c, 1 - c, running, score, epsilon=0.25)
    assert done.running.tolist() == [False, True, False, False]
    assert done.weight.tolist() == [0.5, 0.24, 0.5, 0.0]
    assert done.over.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert done.remainder.tolist() == [0.5, 0.26, 0.5, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_weights_sum_to_one_and_the_ponder_cost_is_blocks_and_remainder(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(12, 200, generator=generator, dtype=torch.float64) ** 3
    c, r, running = torch.zeros(200).double(), torch.ones(200).double(), torch.ones(200, dtype=torch.bool)
    weight, rho = torch.zeros(200).double(), torch.zeros(200).double()
    for block in range(12):
        h = torch.ones(200).double() if block == 11 else scores[block]
        rho = rho + running
        done = halt(c, r, running, h, epsilon=0.01)
        c, r, running = done.cumulated, done.remainder, done.running
        weight, rho = weight + done.weight, rho + done.over
    torch.testing.assert_close(weight, torch.ones(200).double())
    for token in range(200):
        total, blocks = 0.0, 0
        for block in range(12):
            h = 1.0 if block == 11 else float(scores[block, token])
            blocks += 1
            if total + h >= 0.99:
                break
            total += h
        assert float(rho[token]) == pytest.approx(blocks + 1 - total)
        assert 0 < 1 - total <= 1


def test_scores_are_wide_whatever_the_features():
    x = torch.full((3, 4), 7.4, dtype=torch.bfloat16)
    assert halting_score(x, gamma=10, beta=-75).dtype == torch.float32
    expected = torch.sigmoid(10 * x[:, 0].double() - 75).float()
    torch.testing.assert_close(halting_score(x, gamma=10, beta=-75), expected)


def test_the_prior_is_the_published_one():
    prior = depth_prior(12, 8).exp()
    assert float(prior[:8].sum()) == pytest.approx(0.98)
    assert float(prior.sum()) == pytest.approx(3.26, abs=5e-3)
    density = torch.tensor([math.exp(-0.5 * (block - 8) ** 2) / math.sqrt(2 * math.pi) for block in range(12)]).double()
    assert float((prior / density).mean()) == pytest.approx(3.26, abs=5e-3)
    wanted = depth_prior(12, 8).softmax(0)
    at_best = float(prior_penalty(wanted, depth_prior(12, 8), normalised=True))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = (wanted + 0.05 * torch.rand(12, generator=generator)).double()
        assert float(prior_penalty(other, depth_prior(12, 8), normalised=True)) > at_best
    assert at_best == pytest.approx(0, abs=2e-3)
    assert float(prior_penalty(torch.zeros(12), depth_prior(12, 8), normalised=False)) < math.inf
    assert float(prior_penalty(torch.ones(12), depth_prior(12, 100), normalised=False)) >= 0


def test_both_published_sets_of_constants():
    assert published_constants("released", 192) == (10.0, -30.0)
    assert published_constants("released", 384) == (10.0, -75.0)
    assert published_constants("paper", 384) == (5.0, -10.0)
    assert AViT().spec() == {"name": "avit"}
    spec = {"name": "avit", "constants": "paper", "beta": -3.0, "ponder": 0.1, "normalised": True}
    assert build(spec).spec() == spec


@torch.no_grad()
def test_other_reducers_act_before_it_and_not_after(images):
    base = make_vit()
    for first in (ATS(Ratio(0.7)), TopK(Ratio(0.5)), ToMe(Drop(8))):
        model = reduce_tokens(base.double(), at(0, first) | at([2, 3], AViT(**HALTING)))
        assert_same_alone_and_in_a_batch(model, images)
    for late in (at([1, 3], AViT()) | at(2, TopK(Ratio(0.5))), at([1, 2], AViT()) | at(3, TopK(Ratio(0.5)))):
        with pytest.raises(ReducerError, match="place (the other|this) one before"):
            reduce_tokens(base, late)(images.double())
    with pytest.raises(ReducerError, match="cannot be stacked"):
        Stack(AViT(), TopK(Ratio(0.5)))
    dropped = at(0, ATS(Ratio(0.3), keep_class_token=False)) | at(2, AViT())
    with pytest.raises(ReducerError, match="keep_class_token=True"):
        reduce_tokens(base, dropped)(images.double())
    pooled = make_vit("average").double()
    with pytest.raises(ReducerError, match="proportional=False"):
        reduce_tokens(pooled, at(0, ToMe(Drop(8))) | at(2, AViT()))(images.double())


@torch.no_grad()
def test_alone_at_block_0_it_does_nothing(images):
    base = make_vit()
    assert torch.equal(reduce_tokens(base, at(0, AViT(**HALTING)))(images), reduce_tokens(base, at([], AViT()))(images))


def test_settings_are_checked():
    for wrong in ({"gamma": "steep"}, {"beta": float("inf")}, {"ponder": -1}, {"prior": float("nan")}):
        with pytest.raises(ReducerError, match="finite number"):
            AViT(**wrong)
    with pytest.raises(ReducerError, match="from 0 to 1"):
        AViT(epsilon=2)
    with pytest.raises(ReducerError, match="whole number"):
        AViT(prior_depth=0)
    with pytest.raises(ReducerError, match="released, paper"):
        AViT(constants="measured")
