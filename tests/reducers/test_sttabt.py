"""STTABT: ApproxNet and its distillation, concrete masks, and a block that reads some tokens and updates fewer."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ablations.measure.finetune.objective import TrainingViT
from reducers import ATS, Count, Ratio, ReducerError, Stack, TopK, at, every, reduce_tokens
from reducers.hosts import host_of
from reducers.hosts.timm_vit import TimmBlock
from reducers.kit.back_tracking import back_track
from reducers.methods import STTABT, SmallInput
from reducers.methods.sttabt.approx_net import ApproxNet, Guess, watch
from reducers.methods.sttabt.concrete_masks import concrete_masks, evened, masked_block
from reducers.methods.sttabt.method import Plan, keep_nested
from reducers.runtime.plain import PlainModel
from reducers.tokens import Layout, TokenBatch

from .conftest import DEPTH, make_vit
from .test_evit_tome_topk import embed

FULL = 1e4  # a p_logit at which every mask is full
KINDS = ["class", "distilled", "registers", "qk_norm"]


def learned(reducer: STTABT, kind: str = "class", *, blocks: object = range(DEPTH)) -> STTABT:
    """The reducer joined to a model, its network far from its neutral start."""
    reduce_tokens(make_vit(kind), at(blocks, reducer))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in reducer.approx.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return reducer


# --- masks ------------------------------------------------------------------------------------------------------------


def slow_masks(scores: list[Tensor], thresholds: list[float], prefix: int) -> list[list[float]]:
    """One image, number by number: scores (H, T, T) of each block."""
    tokens = scores[0].shape[2]
    mask = [1.0 if j < prefix else 0.0 for j in range(tokens)]
    importance, masks = [1.0] * tokens, []
    masks.append(mask)
    for found, threshold in zip(reversed(scores), reversed(thresholds), strict=True):
        rows = []
        for q in range(tokens):
            row = [0.0] * tokens
            for head in found:
                values = head[q].tolist()
                mean = sum(values) / tokens
                std = math.sqrt(sum((v - mean) ** 2 for v in values) / tokens)
                for j, value in enumerate(values):
                    row[j] += 0.5 * (1 + math.erf((value - mean) / std / math.sqrt(2))) / len(found)
            rows.append(row)
        g = [
            sum(mask[q] * rows[q][j] * (0.1 * importance[q] + 0.9) for q in range(tokens)) / sum(mask)
            for j in range(tokens)
        ]
        importance = [0.01 + 0.99 * value / max(g) for value in g]
        p = 1 / (1 + math.exp(-threshold))
        chance = [min(max(c, 1e-7), 1 - 1e-7) for c in importance]
        soft = [
            1 / (1 + math.exp(-(math.log(p / (1 - p)) + math.log(c / (1 - c))) / 0.1)) for c in chance
        ]  # fmt: skip
        mask = [max(a, b) for a, b in zip(soft, mask, strict=True)]
        masks.append(mask)
    return masks[::-1]


@pytest.mark.parametrize("prefix", [1, 3])
def test_concrete_masks_equal_a_slow_reference_and_nest(prefix):
    torch.manual_seed(0)
    scores = [2 * torch.randn(2, 3, 9, 9, dtype=torch.float64) for _ in range(4)]
    thresholds = torch.tensor([-0.5, 0.2, -0.1, -0.4], dtype=torch.float64)
    masks = concrete_masks(scores, thresholds, prefix=prefix)
    for image in range(2):
        expected = slow_masks([found[image] for found in scores], thresholds.tolist(), prefix)
        torch.testing.assert_close(
            torch.stack([mask[image] for mask in masks]), torch.tensor(expected, dtype=torch.float64)
        )
    for earlier, later in itertools.pairwise(masks):
        assert (earlier >= later).all()
        assert ((earlier >= 0.5) >= (later >= 0.5)).all()
    assert all((mask[:, :prefix] == 1).all() for mask in masks)
    assert (masks[-1][:, prefix:] == 0).all()
    first_rows = [*scores[:-1], scores[-1][:, :, :prefix]]
    for short, long in zip(concrete_masks(first_rows, thresholds, prefix=prefix), masks, strict=True):
        torch.testing.assert_close(short, long)


def test_a_mask_is_hard_where_importance_exceeds_the_threshold():
    scores = [torch.randn(1, 1, 12, 12)]
    importance = 0.01 + 0.99 * evened(scores[0])[0, 0] / evened(scores[0])[0, 0].max()
    for point in (-3.0, -1.0, 0.0, 1.0):
        mask = concrete_masks(scores, torch.tensor([point]), prefix=1)[0][0]
        p = 1 / (1 + math.exp(-point))
        assert torch.equal(mask[1:] >= 0.5, importance[1:] >= 1 - p)
    full = concrete_masks(scores, torch.tensor([FULL]), prefix=1)[0]
    assert (full == 1).all()


def test_scores_are_evened_out_and_constant_ones_are_no_trouble():
    even = evened(3 + 5 * torch.randn(1, 4, 1, 20_000))
    assert torch.histc(even.expand(1, 1, 20_000), 4, 0, 1).min() > 0
    single = evened(torch.randn(1, 1, 1, 20_000))
    shares = torch.histc(single, 10, 0, 1) / 20_000
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.01)
    constant = torch.full((1, 2, 3, 3), 0.7, requires_grad=True)
    masks = concrete_masks([constant, constant], torch.zeros(2, requires_grad=True), prefix=1)
    assert all(torch.isfinite(mask).all() for mask in masks)
    masks[0].sum().backward()
    assert torch.isfinite(constant.grad).all()


def test_nested_gathers_are_read_at_once():
    layout = Layout.ragged(torch.tensor([4, 3]), torch.tensor([1, 1]))
    read = torch.tensor([1, 0, 1, 1, 1, 1, 0]).bool()
    update = torch.tensor([1, 0, 0, 1, 1, 0, 0]).bool()
    first, second = keep_nested(layout, [read, update])
    assert first.rows.tolist() == [0, 2, 3, 4, 5]
    assert second.rows.tolist() == [0, 2, 3]
    assert first.then(second).rows.tolist() == [0, 3, 4]
    assert first.new.counts == [3, 2] and second.new.counts == [2, 1]
    (only,) = keep_nested(Layout.alike(1, 4, 1, read.device), [read[:4]])
    assert only.new.uniform == (3, 1)


# --- a block under masks ----------------------------------------------------------------------------------------------


def by_formula(block, x: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """x (B, T, D), masks (B, T), all written out."""
    b, t, _ = x.shape
    attn, keys, rows = block.attn, read[:, None, :, None], write[:, None, :, None]
    q, k, v = attn.qkv(block.norm1(x)).reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q) * rows, attn.k_norm(k) * keys
    shares = (q @ k.transpose(2, 3) * attn.scale).softmax(-1) * read[:, None, None]
    seen = (shares / shares.sum(-1, keepdim=True)) @ (v * keys)
    out = attn.norm(seen.transpose(1, 2).reshape(b, t, -1))
    x = x + block.ls1(attn.proj(out) * write[..., None])
    hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)) * write[..., None])
    return x + block.ls2(block.mlp.fc2(hidden) * write[..., None])


@pytest.mark.parametrize("kind", ["class", "qk_norm"])
def test_a_block_under_soft_masks_is_the_formula_with_its_gradients(kind):
    block = make_vit(kind).double().blocks[1]
    torch.manual_seed(0)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    results = []
    read = torch.rand(2, 6, dtype=torch.float64)
    write = read * torch.rand(2, 6, dtype=torch.float64)
    for run in (
        lambda r, w: by_formula(block, x, r, w).flatten(0, 1),
        lambda r, w: masked_block(
            TimmBlock(block),
            TokenBatch.from_images(x, prefix=1, has_class_token=True, track=False),
            r.flatten(),
            w.flatten(),
        ),
    ):
        r, w = read.clone().requires_grad_(), write.clone().requires_grad_()
        out = run(r, w)
        out.square().sum().backward()
        results.append((out.detach(), r.grad, w.grad))
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)
    assert not any(module._forward_hooks for module in block.modules())


class Hardened(STTABT):
    """Trains under masks that are 0 or 1: the decision of inference, carried out the slow way."""

    def plan(self, images, host):
        plan = super().plan(images, host)
        return Plan(plan.first, plan.prefix, [(mask >= 0.5).to(images.dtype) for mask in plan.masks], plan.guess)


@pytest.mark.parametrize("blocks", [range(DEPTH), [1, 3], [0, 1]], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "average_with_class"])
@torch.no_grad()
def test_the_gathered_pass_is_the_masked_one(kind, blocks, images):
    base, images = make_vit(kind).double(), images.double()
    fast = learned(STTABT(operating_point=-0.3), kind, blocks=blocks).double()
    slow = Hardened(operating_point=-0.3)
    gathered = reduce_tokens(base, at(blocks, fast))
    masked = reduce_tokens(base, at(blocks, slow))
    slow.load_state_dict(fast.state_dict())
    logits, trace = gathered.trace(images)
    assert (trace.tokens[:, -1] < trace.tokens[:, 0]).any()
    atol = 1e-9 if list(blocks) == list(range(DEPTH)) else 1e-4  # a plain block under a mask has an epsilon
    torch.testing.assert_close(masked(images), logits, rtol=0, atol=atol)


@pytest.mark.parametrize("blocks", [range(DEPTH), [1, 2]], ids=str)
@torch.no_grad()
def test_a_mean_weighs_tokens_by_their_soft_masks_once(blocks, images):
    base, images = make_vit("average_with_class").double(), images.double()
    reducer = STTABT(operating_point=-0.3)
    model = reduce_tokens(base, at(blocks, reducer))
    reducer.load_state_dict(learned(STTABT(operating_point=-0.3), blocks=blocks).state_dict())
    entering: list[Tensor] = []
    handle = base.norm.register_forward_hook(lambda _module, args, _output: entering.append(args[0]))
    logits = model.train()(images)
    handle.remove()
    scores = reducer.approx(images).scores[blocks[0] :]
    masks = concrete_masks(scores, reducer.thresholds, prefix=1)
    last = blocks[-1] + 1 - blocks[0]
    left = masks[last - 1 if last == len(masks) - 1 else last][:, 1:, None]
    assert ((left > 0.1) & (left < 0.9)).any(), "some are neither kept nor gone"
    x = base.norm(entering[0].view(len(images), 37, -1))[:, 1:]
    pooled = (x * left).sum(1) / left.sum(1)
    torch.testing.assert_close(logits, base.head(base.fc_norm(pooled)), rtol=0, atol=1e-9)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_masks_are_the_plain_model_for_the_class_token(kind, images):
    base, images = make_vit(kind).double(), images.double()
    for reducer in (STTABT(operating_point=FULL), STTABT(Ratio(1.0))):
        model = reduce_tokens(base, every(1, reducer, depth=DEPTH))
        torch.testing.assert_close(model(images), base(images), rtol=0, atol=1e-9)
        _, trace = model.trace(images)
        assert (trace.tokens[:, -1] == base.num_prefix_tokens).all(), "the last block updates these alone"
        assert (trace.tokens[:, :-1] == trace.tokens[:, :1]).all()
        reducer.train()
        model.training = True
        torch.testing.assert_close(model(images), base(images), rtol=0, atol=1e-9)


@torch.no_grad()
def test_counts_nest_and_grow_with_the_operating_point(images):
    base, reducer = make_vit(), learned(STTABT())
    model, before = reduce_tokens(base, every(1, reducer, depth=DEPTH)), 0
    for point in (-3.0, -1.0, 0.0, 1.0):
        reducer.thresholds.fill_(point)
        _, trace = model.trace(images)
        assert (trace.tokens[:, 1:].diff(dim=1) <= 0).all()
        assert trace.tokens.sum() > before
        assert all((trace.kept(b) <= trace.kept(b - 1)).all() for b in range(1, DEPTH))
        before = trace.tokens.sum()
        assert point == 1.0 or len(set(trace.tokens[:, 2].tolist())) > 1, "adaptive"


@torch.no_grad()
def test_with_a_budget_importance_is_traced_through_the_guessed_maps(images):
    base, reducer = make_vit(), learned(STTABT(Count(9)))
    model = reduce_tokens(base, every(1, reducer, depth=DEPTH))
    maps = [scores.softmax(-1).mean(1) for scores in reducer.approx(images).scores]
    masks = back_track(maps, prefix=1, count=9)
    _, trace = model.trace(images)
    for block in range(DEPTH):
        assert torch.equal(trace.kept(block), masks[block + 1][:, 1:])
    assert not hasattr(reducer, "thresholds")


@torch.no_grad()
def test_costs_are_those_of_the_rows(images):
    base, reducer = make_vit(), learned(STTABT(operating_point=-0.5))
    masks = [mask >= 0.5 for mask in concrete_masks(reducer.approx(images).scores, reducer.thresholds, prefix=1)]
    _, trace = reduce_tokens(base, every(1, reducer, depth=DEPTH)).trace(images)
    d, total = 32, 36 * 3 * 8 * 8 * 32 + 32 * 7
    for block in range(DEPTH):
        read, update = masks[block].sum(1).double(), masks[block + 1].sum(1).double()
        total = total + 2 * update * d * d + 2 * read * d * d + 2 * update * read * d + 8 * update * d * d
    torch.testing.assert_close(trace.macs - trace.reducer_macs, total)
    torch.testing.assert_close(trace.reference_macs, total)
    with FlopCounterMode(display=False) as counter:
        guess = reducer.approx(images, whole=False)
        concrete_masks(guess.scores, reducer.thresholds, prefix=1)
    assert counter.get_total_flops() / 2 / len(images) == float(trace.reducer_macs[0])


def test_a_small_deits_network_costs_a_thirteenth_of_it():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        net = ApproxNet(PlainModel(host_of(model)), shrink=4)
    assert net.width == 96 and net.blocks[0].heads == 6
    assert net.macs() == pytest.approx(0.338e9, rel=0.002)


@torch.no_grad()
def test_the_network_says_the_same_in_part_and_whole(images):
    net = learned(STTABT(), "registers").approx
    whole, part = net(images), net(images, whole=False)
    for long, short in zip(whole.scores, part.scores, strict=True):
        torch.testing.assert_close(short, long[:, :, : short.shape[2]], rtol=1e-5, atol=1e-5)
    assert part.scores[-1].shape[2] == net.prefix == 5
    assert whole.logits.shape == (5, 7)


def test_models_and_images_it_cannot_serve_are_refused(images):
    with pytest.raises(ReducerError, match="6 x 6 patches and the images have 4 x 4"):
        reduce_tokens(make_vit(), at(0, SmallInput(Count(16))) | at(1, STTABT()))(images)
    with pytest.raises(ReducerError, match="cannot be stacked"):
        Stack(STTABT(), TopK(Count(4)))
    for setting in ({"shrink": 0}, {"operating_point": "low"}, {"distillation": 2.0}, {"teacher": -1.0}):
        with pytest.raises(ReducerError, match="must be a"):
            STTABT(**setting)


@torch.no_grad()
def test_after_another_method_it_keeps_what_is_left_of_its_choice(images):
    reducer = learned(STTABT(operating_point=-0.5), blocks=[1, 2, 3])
    before = at(0, ATS(Ratio(0.7)))
    alone = reduce_tokens(make_vit(), before).trace(images)[1]
    _, trace = reduce_tokens(make_vit(), before | at([1, 2, 3], reducer)).trace(images)
    masks = concrete_masks(reducer.approx(images).scores[1:], reducer.thresholds, prefix=1)
    for block in (1, 2, 3):
        assert torch.equal(trace.kept(block), alone.kept(0) & (masks[block][:, 1:] >= 0.5))


# --- training ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_watched_is_the_plain_model(images):
    base = make_vit("registers").double()
    images = images.double()
    dense = watch(PlainModel(host_of(base)), images)
    torch.testing.assert_close(dense.logits, base(images), rtol=0, atol=1e-9)
    for whole, mean in zip(dense.maps, PlainModel(host_of(base)).attention_maps(images), strict=True):
        torch.testing.assert_close(whole.mean(1), mean)
    x = embed(base, images)
    torch.testing.assert_close(dense.embedding, x)
    for block, hidden in zip(base.blocks, dense.hidden, strict=True):
        x = block(x)
        torch.testing.assert_close(hidden, x)


def test_distillation_losses_are_those_of_the_formulas(images):
    reducer, base = learned(STTABT()), make_vit()
    dense, guess = watch(PlainModel(host_of(base)), images), reducer.approx(images)
    found = reducer.mimicry(guess, dense, hidden=0.01, prediction=200.0)
    rows = []
    for scores, seen in zip(guess.scores, dense.maps, strict=True):
        ours = scores.softmax(-1)
        rows.append((seen * (seen.clamp(min=1e-30).log() - ours.log())).sum(-1).mean())
    torch.testing.assert_close(found["attention"], torch.stack(rows).mean())
    errors = [
        (linear(ours) - theirs).square().mean()
        for linear, ours, theirs in zip(reducer.mimicry.hidden, guess.hidden, dense.hidden, strict=True)
    ]
    torch.testing.assert_close(found["hidden"], 0.01 * torch.stack(errors).mean())
    error = (reducer.mimicry.embedding(guess.embedding) - dense.embedding).square().mean()
    torch.testing.assert_close(found["embedding"], error)
    gap = (guess.logits.softmax(1) - dense.logits.softmax(1)).square().mean()
    torch.testing.assert_close(found["prediction"], 200 * gap)
    itself = Guess([seen.clamp(min=1e-30).log() for seen in dense.maps], guess.embedding, guess.hidden, dense.logits)
    perfect = reducer.mimicry(itself, dense, hidden=0.01, prediction=200.0)
    assert abs(float(perfect["attention"].detach())) < 1e-5 and float(perfect["prediction"].detach()) == 0


@pytest.mark.parametrize(("steps", "share"), [(25, 0.95), pytest.param(100, 0.9, marks=pytest.mark.slow)])
def test_first_the_network_is_distilled_and_then_everything_learns(steps, share, images):
    reducer = STTABT(operating_point=-0.5)
    model = TrainingViT(make_vit(), every(1, reducer, depth=DEPTH)).train()
    optimizer = torch.optim.Adam(reducer.parameters(), lr=1e-2)
    reducer.train_phase(0.0, model.base)
    history = []
    for _ in range(steps):
        outputs, state = model.observed(images)
        parts = reducer.losses(state, outputs, torch.arange(5), None)
        assert parts.keys() == {"attention", "hidden", "embedding", "prediction"}
        assert not outputs.logits.requires_grad, "the model stands still"
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
        history.append(float(parts["attention"].detach()))
    assert history[-1] < share * history[0]
    assert reducer.thresholds.grad is None

    reducer.train_phase(0.6, model.base)
    model.zero_grad(set_to_none=True)
    outputs, state = model.observed(images)

    class Teacher:
        logits = make_vit(seed=1)(images).detach()

    parts = reducer.losses(state, outputs, torch.arange(5), Teacher)
    assert parts.keys() == {"teacher", "thresholds", "occupancy"}
    student, known = outputs.logits.softmax(1), Teacher.logits.softmax(1)
    torch.testing.assert_close(parts["teacher"], 0.5 * (known * (known / student).log()).sum(1).mean())
    masks = state.plans[reducer].masks
    share = torch.stack([mask.mean() for mask in masks[:-1]]).mean()
    wanted = torch.tensor(-0.5).sigmoid()
    torch.testing.assert_close(parts["occupancy"], 1e-3 * (share - wanted).square())
    F.cross_entropy(outputs.logits, torch.arange(5)).backward()
    assert reducer.thresholds.grad.abs().min() > 0, "the task alone reaches every threshold"
    reached = [name for name, parameter in reducer.approx.named_parameters() if parameter.grad is not None]
    assert "patch_embed.weight" in reached and "blocks.0.qkv.weight" in reached
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.base.parameters())


def test_thresholds_are_held_at_the_operating_point():
    reducer = STTABT(operating_point=-1.5)
    model = TrainingViT(make_vit(), at([1, 3], reducer)).train()
    assert reducer.thresholds.shape == (3,), "from the first block it is placed at"
    with torch.no_grad():
        reducer.thresholds += torch.tensor([1.0, 0.0, -2.0])
    outputs, state = model.observed(torch.randn(2, 3, 48, 48))

    class Teacher:
        logits = outputs.logits.detach()

    parts = reducer.losses(state, outputs, torch.arange(2), Teacher)
    assert float(parts["thresholds"].detach()) == pytest.approx(1e-3 * 5.0)
    assert float(parts["teacher"].detach()) == pytest.approx(0, abs=1e-6)
