"""GTP and Zero-TPrune: the graphs, their formulas and their limits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from reducers import ATS, Count, Drop, Mix, Ratio, ReducerError, Stack, ToMe, TopK, at, every, reduce_tokens
from reducers.methods import GTP, ZeroTPrune
from reducers.methods.gtp import cosine_graph, sparsified, spatial_graph, token_rank
from reducers.methods.zero_tprune import combine_heads, most_alike, page_rank, rounds_at
from reducers.tokens import Layout

from .conftest import assert_same_alone_and_in_a_batch, make_vit
from .test_evit_tome_topk import embed, feed_forward


def test_the_spatial_graph_is_the_normalised_neighbourhood():
    pos = torch.tensor([[-1, *range(12)]])
    found = spatial_graph(pos, (3, 4))[0]
    assert (found[0] == 0).all() and (found[:, 0] == 0).all()
    cells = [(p // 4, p % 4) for p in range(12)]
    near = torch.tensor(
        [[float(a != b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1) for b in cells] for a in cells]
    )
    degree = near.sum(1)
    torch.testing.assert_close(found[1:, 1:], near / (degree[:, None] * degree).sqrt())
    some = torch.tensor([[-1, 0, 5, 11]])  # sliced, the degrees stay those of the whole grid
    torch.testing.assert_close(spatial_graph(some, (3, 4))[0, 1, 2], near[0, 5] / (degree[0] * degree[5]).sqrt())


def test_the_cosine_graph_is_symmetric_and_joins_the_most_similar():
    x = torch.randn(2, 9, 5)
    valid = torch.tensor([[False] + [True] * 8, [False] + [True] * 5 + [False] * 3])
    graph = cosine_graph(x, valid, neighbours=2)
    assert torch.equal(graph, graph.transpose(1, 2))
    assert (graph.diagonal(dim1=1, dim2=2) == 0).all()
    assert (graph[~valid] == 0).all()
    alike = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
    for i in range(1, 6):
        others = sorted((j for j in range(1, 6) if j != i), key=lambda j: -alike[1, i, j])
        assert (graph[1, i, others[:2]] > 0).all()


@torch.no_grad()
def test_gtp_propagates_by_the_formula(images):
    """Kept features, and scales, grow by alpha G of those that go; computed by hand from the signals."""
    seen = {}

    class Spy(GTP):
        def decide(self, signals, state):
            decision = super().decide(signals, state)
            seen[state.block] = (signals, decision)
            return decision

    model = make_vit().double()
    reduce_tokens(model, every(1, Spy(Drop(6), alpha=0.3), depth=4))(images.double())
    for block in range(4):
        signals, decision = seen[block]
        assert isinstance(decision.map, Mix)
        layout = signals.layout
        n = layout.uniform[0]
        attention = signals.attention()[0]
        rank = [
            max(float(head[i, i]) for head in attention) * max(float(head[:, i].sum()) for head in attention)
            for i in range(n)
        ]
        torch.testing.assert_close(token_rank(signals.attention())[0], torch.tensor(rank, dtype=torch.float64))
        gone = sorted(range(1, n), key=lambda i: rank[i])[:6]
        kept = [i for i in range(n) if i not in gone]
        graph = spatial_graph(layout.pad(signals.positions(), fill=-1), (6, 6))[0].double()
        x, size = layout.pad(signals.output())[0], layout.pad(signals.size)[0].double()
        expected = torch.stack([x[i] + 0.3 * sum(graph[i, j] * x[j] for j in gone) for i in kept])
        scales = torch.stack([size[i] + 0.3 * sum(graph[i, j] * size[j] for j in gone) for i in kept])
        torch.testing.assert_close(decision.map.new.pad(decision.features)[0], expected, rtol=1e-6, atol=1e-6)
        found = decision.map.new.pad(decision.map.total(signals.size))[0].double()
        torch.testing.assert_close(found, scales, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(decision.map.apply(signals.output()), decision.features, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_gtp_without_strength_is_a_selection(images):
    """alpha = 0: nothing is passed on, every scale stays 1."""
    model = make_vit().double()
    logits, trace = reduce_tokens(model, at([1, 2], GTP(Drop(6), alpha=0.0))).trace(images.double())
    assert torch.isfinite(logits).all()
    assert (trace.kept(2).sum(1) == 24).all()
    with pytest.raises(ReducerError, match="from 0 to 1"):
        GTP(Drop(6), alpha=-1.0)


def test_power_iteration_finds_the_dominant_eigenvector():
    attention = torch.randn(2, 3, 12, 12, dtype=torch.float64).softmax(-1)
    valid = torch.ones(2, 12, dtype=torch.bool)
    score = page_rank(attention, valid, iterations=200)
    for image in range(2):
        for head in range(3):
            values, vectors = torch.linalg.eig(attention[image, head].T)
            dominant = vectors[:, values.abs().argmax()].real
            torch.testing.assert_close(score[image, head], dominant / dominant.sum(), rtol=1e-8, atol=1e-10)


def test_uniform_attention_gives_uniform_scores_with_padding():
    valid = torch.arange(10) < torch.tensor([10, 6])[:, None]
    attention = (valid[:, None, :, None] & valid[:, None, None]).double() / valid.sum(1)[:, None, None, None]
    attention = attention.expand(-1, 4, -1, -1)
    score = combine_heads(page_rank(attention, valid, iterations=30), valid, low=0.01, high=0.7)
    for image, n in ((0, 10), (1, 6)):
        torch.testing.assert_close(score[image, :n], torch.full((n,), 1 / n, dtype=torch.float64))
        assert (score[image, n:] == 0).all()


def test_heads_that_tell_nothing_or_see_one_token_are_left_out():
    flat, peak = torch.full((8,), 1 / 8), torch.eye(8)[0]
    good = torch.tensor([2.0, 1, 1, 1, 1, 1, 0.5, 0.5]) / 8
    valid = torch.ones(1, 8, dtype=torch.bool)
    found = combine_heads(torch.stack([flat, peak, good])[None], valid, low=0.01, high=0.7)
    torch.testing.assert_close(found[0], good)
    both = combine_heads(torch.stack([flat, peak])[None], valid, low=0.01, high=0.7)  # none passes: all count
    torch.testing.assert_close(both[0], ((flat**2 + peak**2) / 2).sqrt())


def test_the_most_alike_of_the_less_important_set_go():
    metric = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [-1, 0], [0.6, 0.6]]])
    order = torch.tensor([[0, 2, 1, 4, 3]])  # sets by rank: {0, 1, 3} and {2, 4}
    valid = torch.ones(1, 5, dtype=torch.bool)
    assert most_alike(metric, order, valid, torch.tensor([1]))[0].tolist() == [False, False, True, False, False]
    assert most_alike(metric, order, valid, torch.tensor([2]))[0].tolist() == [False, False, True, False, True]
    assert not most_alike(metric, order, valid, torch.tensor([0])).any()


def test_iterations_fall_with_depth():
    assert [rounds_at(block, 12) for block in (0, 3, 4, 9, 11)] == [30, 30, 5, 5, 1]


@torch.no_grad()
def test_zero_tprune_meets_its_budget_whatever_the_split(images):
    model = make_vit()
    masks = []
    for similar in (0.0, 0.5, 1.0):
        _, trace = reduce_tokens(model, at([0, 2], ZeroTPrune(Ratio(0.5), similar=similar))).trace(images)
        assert trace.tokens[0].tolist() == [37, 19, 19, 10, 10]
        masks.append(trace.kept(2))
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("reducer", [GTP(Count(12)), GTP(Ratio(0.7), graph="cosine"), ZeroTPrune(Count(12))])
@pytest.mark.parametrize("before", [ATS(Ratio(0.6)), ToMe(Drop(6)), TopK(Ratio(0.8))])
@torch.no_grad()
def test_after_another_reducer_alone_and_in_a_batch(reducer, before, images):
    """At the next block, and at the same block, where the attention map is carried through the other's map."""
    for placement in (at(0, before) | at([1, 3], reducer), at(1, Stack(before, reducer))):
        assert_same_alone_and_in_a_batch(reduce_tokens(make_vit().double(), placement), images)


@torch.no_grad()
def test_the_attention_map_carried_through_a_selection_is_its_part(images):
    seen = []

    class Spy(TopK):
        def decide(self, signals, state):
            seen.append(signals.attention())
            return super().decide(signals, state)

    first = TopK(Count(20))
    _, trace = reduce_tokens(make_vit().double(), at(1, Stack(Spy(Count(36)), first, Spy(Count(10))))).trace(
        images.double()
    )
    whole, part = seen
    assert part.shape == (5, 2, 21, 21)
    _, only = reduce_tokens(make_vit().double(), at(1, first)).trace(images.double())
    for image in range(5):
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), only.kept(1)[image].nonzero().squeeze(1) + 1])
        torch.testing.assert_close(part[image], whole[image][:, rows][:, :, rows])
    assert (trace.kept(1).sum(1) == 10).all()


def slow_sparse_gtp(model, images, gone_each, alpha, theta):
    """One image at a time, every head's entries as a sorted list; the model's grid is 6 x 6."""
    logits, prefix = [], model.num_prefix_tokens
    for image in images:
        x = embed(model, image[None])
        size, pos = torch.ones(x.shape[1], dtype=x.dtype), [-1] * prefix + list(range(36))
        for index, block in enumerate(model.blocks):
            attn, t = block.attn, x.shape[1]
            q, k, v = attn.qkv(block.norm1(x)).reshape(1, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
            weights = (scores + (size.log() if index else 0)).softmax(-1)[0]
            sparse = torch.zeros_like(weights)
            for head in range(attn.num_heads):
                entries = sorted(((float(weights[head, i, j]), i, j) for i in range(t) for j in range(t)), reverse=True)
                for _, i, j in entries[: math.floor(round(theta * t * t, 9))]:
                    sparse[head, i, j] = weights[head, i, j]
            y = (x + block.ls1(attn.proj(attn.norm((sparse @ v[0]).transpose(0, 1).reshape(1, t, -1)))))[0]
            rank = [
                max(float(head[i, i]) for head in weights) * max(float(head[:, i].sum()) for head in weights)
                for i in range(t)
            ]
            gone = sorted(range(prefix, t), key=rank.__getitem__)[:gone_each]
            kept = [i for i in range(t) if i not in gone]
            graph = alpha * spatial_graph(torch.tensor([pos]), (6, 6))[0].double()
            y = torch.stack([y[i] + sum(graph[i, j] * y[j] for j in gone) for i in kept])
            size = torch.stack([size[i] + sum(graph[i, j] * size[j] for j in gone) for i in kept])
            pos = [pos[i] for i in kept]
            x = feed_forward(block, y[None])
        logits.append(model.forward_head(model.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize("kind", ["class", "registers", "qk_norm"])
@torch.no_grad()
def test_sparsified_attention_equals_the_slow_reference(kind, images):
    model = make_vit(kind).double()
    expected = slow_sparse_gtp(model, images[:2].double(), 5, 0.3, 0.4)
    found = reduce_tokens(model, every(1, GTP(Drop(5), alpha=0.3, theta=0.4), depth=4))(images[:2].double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_largest_entries_stay_image_by_image_and_head_by_head():
    """Padded images are cut as each would be alone, and gradients reach what stays."""
    lengths = torch.tensor([7, 4, 6])
    ragged = Layout.ragged(lengths, torch.ones_like(lengths))
    valid = ragged.valid[:, None, :, None] & ragged.valid[:, None, None]
    maps = torch.rand(3, 2, 7, 7, dtype=torch.float64) * valid
    for share in (Fraction(3, 10), Fraction(1, 10**6), Fraction(1)):
        found = sparsified(maps.requires_grad_(), ragged, share)
        for image, n in enumerate(lengths.tolist()):
            alone = sparsified(maps[image : image + 1, :, :n, :n], Layout.alike(1, n, 1, maps.device), share)
            assert torch.equal(alone[0], found[image, :, :n, :n])
            stays = max(1, n * n * share.numerator // share.denominator)
            assert ((alone[0] > 0).flatten(1).sum(1) == stays).all()
            for head in range(2):
                entries = maps[image, head, :n, :n]
                assert stays == n * n or entries[alone[0, head] == 0].amax() < entries[alone[0, head] > 0].amin()
        (slope,) = torch.autograd.grad(found.sum(), maps)
        assert torch.equal(slope > 0, found > 0)


@torch.no_grad()
def test_theta_changes_the_attention_even_where_no_token_goes(images):
    model, images = make_vit().double(), images.double()
    plain = model(images)
    logits, trace = reduce_tokens(model, at([1, 2], GTP(Drop(0), theta=0.5))).trace(images)
    assert (trace.tokens == 37).all() and (trace.reducer_macs == 0).all()
    assert (logits - plain).abs().max() > 1e-3
    whole = reduce_tokens(model, at([1, 2], GTP(Drop(0), theta=1)))(images)
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_map_that_is_used_itself_is_paid_once(images):
    """At theta = 1 the fused kernel computes the products again that the ranks were told by."""
    costs = [reduce_tokens(make_vit(), at(1, GTP(Drop(6), theta=theta))).cost(images) for theta in (1.0, 0.5)]
    assert torch.equal(costs[0] - costs[1], torch.full_like(costs[0], 37 * 37 * 32))


@torch.no_grad()
def test_sparsified_attention_in_stacks_and_after_adaptive_methods(images):
    images = images.double()
    sparse = GTP(Ratio(0.7), theta=0.5)
    for placement in (at(0, ATS(Ratio(0.6))) | at([1, 3], sparse), at([1, 3], Stack(sparse, ATS(Ratio(0.8))))):
        assert_same_alone_and_in_a_batch(reduce_tokens(make_vit().double(), placement), images)
    with pytest.raises(ReducerError, match="first in the stack"):
        reduce_tokens(make_vit(), at(1, Stack(TopK(Ratio(0.8)), sparse)))(images.float())
    for theta in (0, 1.5, True, "half"):
        with pytest.raises(ReducerError, match="above 0 and at most 1"):
            GTP(Drop(1), theta=theta)


@torch.no_grad()
def test_later_signals_follow_the_sparsified_map(images):
    seen = {}

    class Look(TopK):
        def decide(self, signals, state):
            seen["map"], seen["row"] = signals.attention(), signals.class_attention()
            return super().decide(signals, state)

    reduce_tokens(make_vit().double(), at(1, Stack(GTP(Drop(0), theta=0.3), Look(Count(9)))))(images.double())
    assert (seen["map"] == 0).double().mean() > 0.6
    torch.testing.assert_close(seen["row"].view(5, 37, 2), seen["map"][:, :, 0].transpose(1, 2))
