"""BAT against a slow reference written from its description."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from reducers import ATS, Count, Ratio, ReducerError, at, reduce_tokens
from reducers.methods import BAT
from reducers.methods.bat import alike_pairs, decouple, share_out, shares_of
from reducers.tokens import Counts, Layout

from .conftest import make_vit
from .test_clustering import slow_dpc


@pytest.mark.parametrize("alike", [Fraction(0), Fraction(1, 10), Fraction(1)])
@pytest.mark.parametrize("clusters", [1, 10])
def test_shares_come_to_the_count_for_images_alike_and_for_each_its_own(alike, clusters):
    cases = [(n, k) for n in range(1, 40) for k in range(1, n + 1)]
    patches, counts = torch.tensor(cases).T
    layout = Layout.ragged(patches + 1, torch.ones_like(patches))
    together = shares_of(Counts.of(layout, counts), clusters=clusters, alike=alike)
    for row, (n, k) in enumerate(cases):
        attentive, pairs, clustered = share_out(n, k, clusters=clusters, alike=alike)
        assert attentive - pairs + clustered == k
        assert 1 <= clustered <= n - attentive, "no cluster is empty"
        assert 0 <= pairs <= attentive // 2, "each joins another one"
        both = together.attentive.each[row], together.pairs.each[row], together.clusters.each[row]
        assert both == (attentive, pairs, clustered)


def slow_bat(x, attention, shares):
    """One image: lists of (patches, weights), in the order of the new tokens."""
    ranked = sorted(range(len(x)), key=lambda i: -attention[i])
    near, far = ranked[: shares.attentive], sorted(ranked[shares.attentive :])
    best = []
    for j in near[1::2]:
        likeness = [float(torch.cosine_similarity(x[j], x[i], dim=0)) for i in near[0::2]]
        best.append((max(likeness), j, near[0::2][likeness.index(max(likeness))]))
    best = sorted(best, reverse=True)[: shares.pairs]
    gone = {j for _, j, _ in best}
    groups = [[i, *(j for _, j, host in best if host == i)] for i in sorted(near) if i not in gone]
    groups = [(group, [1.0] * len(group)) for group in groups]
    inattentive = ranked[shares.attentive :]  # density ties and centres go by rank
    centres, owner = slow_dpc([x[i].tolist() for i in inattentive], shares.clusters, 5)
    for centre in centres:
        members = [inattentive[i] for i in range(len(inattentive)) if owner[i] == centre]
        groups.append((members, [attention[i] for i in members]))
    assert sorted(i for members, _ in groups for i in members) == sorted([*near, *far])
    return groups


@pytest.mark.parametrize(
    ("count", "clusters", "alike"), [(12, 4, 0.5), (20, 10, 0.1), (3, 10, 1.0), (1, 10, 0.1), (29, 2, 1)]
)
@torch.no_grad()
def test_bat_equals_a_slow_reference(count, clusters, alike):
    """Through the model: the tokens that leave block 1, against groups made from what the block computes."""
    model = make_vit(img_size=48, depth=2).double()
    seen = {}

    class Spy(BAT):
        def decide(self, signals, state):
            decision = super().decide(signals, state)
            layout = signals.layout
            seen["x"] = layout.pad_patches(signals.output())
            seen["attention"] = layout.pad_patches(signals.class_attention().mean(1))
            seen["out"] = decision.map.new.pad_patches(decision.map.apply(signals.output()))
            return decision

    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    reduce_tokens(model, at(1, Spy(Count(count), clusters=clusters, alike=alike)))(images)
    shares = share_out(36, count, clusters=clusters, alike=Fraction(str(alike)))
    for image in range(3):
        x, attention = seen["x"][image], seen["attention"][image].tolist()
        groups = slow_bat(x, attention, shares)
        assert len(groups) == count
        for row, (members, weights) in enumerate(groups):
            expected = sum(w * x[i] for i, w in zip(members, weights, strict=True)) / sum(weights)
            torch.testing.assert_close(seen["out"][image, row], expected, rtol=0, atol=1e-6)


def test_images_of_different_lengths_are_decoupled_as_if_alone():
    lengths, width = (14, 9, 2), 5
    layout = Layout.ragged(torch.tensor(lengths) + 1, torch.ones(3, dtype=torch.int64))
    x = torch.randn(3, 14, width, dtype=torch.float64)
    scores = torch.rand(3, 14).masked_fill(~layout.valid_patches, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    counts = torch.tensor([8, 6, 1])
    shares = shares_of(Counts.of(layout, counts), clusters=3, alike=Fraction(1, 2))
    label, inattentive = decouple(layout, x, order, shares)
    for i, (n, k) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        alone = Layout.alike(1, n + 1, 1, x.device)
        own, far = decouple(
            alone,
            x[i : i + 1, :n],
            order[i : i + 1, :n],
            shares_of(Counts.of(alone, k), clusters=3, alike=Fraction(1, 2)),
        )
        assert torch.equal(own[0], label[i, :n])
        assert torch.equal(far[0], inattentive[i, :n])
        assert sorted(set(own[0].tolist())) == list(range(k))


def test_pairs_join_the_most_similar_host():
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0], [0.5, 0.5]]])
    for pairs, expected in ((0, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 2, 2, 4, 5]), (3, [0, 0, 2, 2, 4, 0])):
        assert alike_pairs(x, torch.tensor([6]), torch.tensor([pairs])).tolist() == [expected]
    assert alike_pairs(x, torch.tensor([2]), torch.tensor([1])).tolist() == [[0, 0, 2, 3, 4, 5]], "others are closed"


@torch.no_grad()
def test_the_budget_is_met_exactly_and_every_patch_is_carried(images):
    _, trace = reduce_tokens(make_vit(), at([0, 1, 2], BAT(Ratio(0.7)))).trace(images)
    assert trace.tokens[0].tolist() == [37, 27, 20, 15, 15]
    assert (trace.owner(3) >= 1).all()
    together, trace = reduce_tokens(make_vit().double(), at(0, ATS(Ratio(0.6))) | at(2, BAT(Count(12)))).trace(
        images.double()
    )
    assert torch.equal(trace.tokens[:, 3], trace.tokens[:, 2].clamp(max=13))
    assert torch.isfinite(together).all()


@torch.no_grad()
def test_the_cost_of_bat(images):
    """Distances among the inattentive, products between alternate attentive ones, means, and the class query."""
    _, trace = reduce_tokens(make_vit(), at(1, BAT(Count(16), clusters=4, alike=0.5))).trace(images)
    attentive, d = 16 - 4 + 6, 32
    own = ((36 - attentive) ** 2 + (attentive // 2) ** 2 + 36) * d
    assert (trace.reducer_macs == own + d * d + 37 * d).all()


@pytest.mark.parametrize("settings", [{"clusters": 0}, {"clusters": True}, {"alike": -0.1}, {"alike": 2}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ReducerError, match=r"BAT\("):
        BAT(Ratio(0.5), **settings)
