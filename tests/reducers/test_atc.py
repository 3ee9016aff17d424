"""ATC against scipy's linkage, and what a clustering must do beyond it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch.nn import functional as F

from reducers import ATS, Count, Ratio, ReducerError, at, reduce_tokens
from reducers.methods import ATC
from reducers.methods.atc import agglomerate, cosine_distances

from .conftest import assert_same_alone_and_in_a_batch, make_vit

LINKAGES = ["single", "average", "complete"]


def partition(labels) -> set[frozenset[int]]:
    """The groups, whatever they are called."""
    return {frozenset(np.flatnonzero(np.asarray(labels) == value).tolist()) for value in set(np.asarray(labels))}


@pytest.mark.parametrize("name", LINKAGES)
def test_labels_equal_scipys(name):
    lengths, counts = (40, 23, 40, 9), (10, 4, 1, 9)
    metric = torch.randn(4, 40, 8, dtype=torch.float64)
    valid = torch.arange(40) < torch.tensor(lengths)[:, None]
    distance = cosine_distances(metric, valid)
    steps = torch.tensor(lengths) - torch.tensor(counts)
    owner = agglomerate(distance, steps, int(steps.max()), name)
    for image, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = distance[image, :length, :length].clone().fill_diagonal_(0)
        tree = linkage(squareform(own.numpy(), checks=False), method=name)
        expected = fcluster(tree, count, criterion="maxclust")
        assert partition(owner[image, :length]) == partition(expected)


@pytest.mark.parametrize("name", LINKAGES)
def test_a_graph_that_may_not_wait_gives_the_same(name, monkeypatch):
    """Where no row may be asked for, all row minima are worked out anew: the same clusters."""
    metric = torch.randn(3, 25, 4, dtype=torch.float64)
    distance = cosine_distances(metric, torch.ones(3, 25, dtype=torch.bool))
    steps = torch.tensor([20, 5, 0])
    asked = agglomerate(distance, steps, 20, name)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(agglomerate(distance, steps, 20, name), asked)


def test_the_input_is_left_as_it_was():
    distance = cosine_distances(torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool))
    before = distance.clone()
    agglomerate(distance, torch.tensor([5, 5]), 5, "average")
    assert torch.equal(distance, before)


@torch.no_grad()
def test_tokens_are_size_weighted_means_and_sizes_sum(images):
    """Two stages by hand: what one block merged counts by its size in the next."""
    model = make_vit().double()
    seen = {}

    class Spy(ATC):
        def decide(self, signals, state):
            decision = super().decide(signals, state)
            seen[state.block] = (signals, decision)
            return decision

    reduce_tokens(model, at([1, 2], Spy(Count(12))) | at(3, Spy(Count(5))))(images.double())
    for block, count in ((1, 12), (3, 5)):
        signals, decision = seen[block]
        layout, new = signals.layout, decision.map.new
        size = new.pad(decision.map.total(signals.size))
        assert new.uniform == (count + 1, 1)
        assert torch.equal(size.sum(1), torch.full((5,), 37.0))
        weights = decision.map.matrix()
        torch.testing.assert_close(weights.sum(2), torch.ones(5, count + 1, dtype=torch.float64), rtol=0, atol=1e-6)
        members = (weights > 0).double() * layout.pad(signals.size).double()[:, None]
        torch.testing.assert_close(weights, members / members.sum(2, keepdim=True), rtol=0, atol=1e-6)
        metric = F.normalize(layout.pad_patches(signals.keys().mean(1)), dim=-1)
        expected = linkage(metric[0].numpy(), "average", metric="cosine")
        labels = weights[0, :, 1:].argmax(0)
        assert partition(labels) == partition(fcluster(expected, count, criterion="maxclust"))
    assert seen[2][1] is None, "12 clusters of 12 tokens: nothing to do"


@pytest.mark.parametrize("name", LINKAGES)
@torch.no_grad()
def test_ragged_images_alone_and_in_a_batch(name, images):
    model = make_vit().double()
    driven = reduce_tokens(model, at(0, ATS(Ratio(0.6))) | at([1, 3], ATC(Count(11), linkage=name)))
    trace = assert_same_alone_and_in_a_batch(driven, images)
    assert len(set(trace.tokens[:, 1].tolist())) > 1


@pytest.mark.parametrize("name", LINKAGES)
@torch.no_grad()
def test_equal_tokens_and_one_cluster_are_defined(name):
    model = make_vit()
    model.pos_embed.zero_()
    flat = torch.full((2, 3, 48, 48), 0.5)
    logits, trace = reduce_tokens(model, at([0, 1], ATC(Count(7), linkage=name)) | at(2, ATC(Count(1)))).trace(flat)
    assert torch.isfinite(logits).all()
    assert trace.tokens[0].tolist() == [37, 8, 8, 2, 2]


def test_an_unknown_linkage_is_refused():
    with pytest.raises(ReducerError, match="choose one of single, average, complete"):
        ATC(Ratio(0.5), linkage="ward")
