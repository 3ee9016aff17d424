"""DPC-KNN, K-Medoids and Token Pooling against slow references written from the specification."""

from __future__ import annotations

import math

import pytest
import torch

from reducers import ATS, Count, Ratio, ReducerError, at, reduce_tokens
from reducers.kit.clustering import density_peaks, labels_of, nearest_centre, squared_distances
from reducers.methods import DPCKNN, KMedoids, TokenPooling
from reducers.methods.kmedoids import better_medoids, far_apart, heaviest
from reducers.methods.token_pooling import weighted_kmeans

from .conftest import assert_same_alone_and_in_a_batch, make_vit


def ragged(*lengths: int, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens (B, N, D) of images of these lengths, padded with values that must not matter, and valid (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), width, generator=generator, dtype=torch.float64)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return x.masked_fill(~valid[..., None], 99.0), valid


def distance(a, b) -> float:
    return math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)))


def slow_dpc(tokens, count, k):
    """Centres and the centre of each token, token by token."""
    n, root = len(tokens), math.sqrt(len(tokens[0]))
    d = [[distance(a, b) / root for b in tokens] for a in tokens]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, n)) for row in d]
    gap = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        gap.append(min(denser) if denser else max(max(row) for row in d))
    ranked = sorted(range(n), key=lambda i: -density[i] * gap[i])
    centres = sorted(ranked[:count])
    owner = [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(n)]
    return centres, owner


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_dpc_knn_equals_a_naive_reference(count, k):
    x, valid = ragged(20, 13, 9)
    squared = squared_distances(x, valid) / x.shape[2]
    centre = density_peaks(squared, valid, torch.full((3,), count), neighbours=k)
    owner = nearest_centre(squared, centre)
    for image, length in enumerate((20, 13, 9)):
        centres, owners = slow_dpc(x[image, :length].tolist(), count, k)
        assert centre[image].nonzero().squeeze(1).tolist() == centres
        assert owner[image, :length].tolist() == owners
        labels = labels_of(owner, centre)[image, :length]
        assert sorted(set(labels.tolist())) == list(range(count)), "no cluster is empty"


def test_dpc_knn_of_equal_tokens_is_defined():
    x = torch.ones(2, 7, 4)
    valid = torch.ones(2, 7, dtype=torch.bool)
    squared = squared_distances(x, valid)
    centre = density_peaks(squared, valid, torch.tensor([3, 7]), neighbours=5)
    assert centre.sum(1).tolist() == [3, 7]
    assert torch.equal(labels_of(nearest_centre(squared, centre), centre)[1], torch.arange(7))


@torch.no_grad()
def test_dpc_knn_merges_are_plain_means_of_their_members(images):
    model = make_vit().double()
    reduced = reduce_tokens(model, at(1, DPCKNN(Count(8), site="input")))
    _, trace = reduced.trace(images.double())
    assert (trace.tokens[:, 2] == 9).all()
    assert (trace.owner(1) >= 1).all(), "every patch is carried by a cluster"
    assert (trace.kept(1).sum(1) == 8).all(), "each cluster is the continuation of one member"


def objective(d, weight, valid, medoid) -> torch.Tensor:
    best = d.masked_fill(~medoid[:, None], torch.inf).amin(2)
    return (best.masked_fill(~valid, 0) * weight).sum(1)


def test_the_objective_of_kmedoids_never_grows():
    x, valid = ragged(30, 22, 8)
    d = squared_distances(x, valid).sqrt()
    weight = torch.rand(3, 30, dtype=torch.float64) * valid
    count = torch.tensor([7, 3, 8])
    for medoid in (heaviest(weight, valid, count), far_apart(d, valid, count, 8)):
        assert medoid.sum(1).tolist() == count.tolist()
        before = objective(d, weight, valid, medoid)
        for _ in range(6):
            medoid = better_medoids(d, weight, valid, medoid)
            assert medoid.sum(1).tolist() == count.tolist()
            assert not (medoid & ~valid).any()
            after = objective(d, weight, valid, medoid)
            assert (after <= before + 1e-12).all()
            before = after


def test_a_step_of_kmedoids_equals_a_naive_reference():
    x, valid = ragged(17, width=3)
    d = squared_distances(x, valid).sqrt()
    weight = torch.rand(1, 17, dtype=torch.float64)
    medoid = heaviest(weight, valid, torch.tensor([4]))
    old = medoid[0].nonzero().squeeze(1).tolist()
    owner = [i if i in old else min(old, key=lambda m: d[0, i, m]) for i in range(17)]
    expected = set()
    for m in old:
        members = [i for i in range(17) if owner[i] == m]
        expected.add(min(members, key=lambda i: float(sum(weight[0, j] * d[0, i, j] for j in members))))
    found = better_medoids(d, weight, valid, medoid)
    assert set(found[0].nonzero().squeeze(1).tolist()) == expected


def test_far_apart_starts_at_the_middle_and_takes_the_farthest_next():
    line = torch.tensor([[[0.0], [1.0], [2.0], [3.0], [10.0]]], dtype=torch.float64)
    valid = torch.ones(1, 5, dtype=torch.bool)
    d = squared_distances(line, valid).sqrt()
    assert far_apart(d, valid, torch.tensor([1]), 1)[0].nonzero().squeeze(1).tolist() == [2]
    assert far_apart(d, valid, torch.tensor([2]), 2)[0].nonzero().squeeze(1).tolist() == [2, 4]
    assert far_apart(d, valid, torch.tensor([3]), 3)[0].nonzero().squeeze(1).tolist() == [0, 2, 4]


@torch.no_grad()
def test_kmedoids_selects_and_needs_a_block_before_only_where_it_weighs_by_attention(images):
    model = make_vit()
    for site in ("input", "attention"):
        _, trace = reduce_tokens(model, at([1, 2], KMedoids(Count(9), site=site))).trace(images)
        assert (trace.kept(2).sum(1) == 9).all()
        assert torch.equal(trace.kept(2), trace.owner(2) >= 0), "the others are dropped"
    _, trace = reduce_tokens(model, at(0, KMedoids(Count(9), weights="equal"))).trace(images)
    assert (trace.tokens[:, 1] == 10).all()
    with pytest.raises(ReducerError, match="block before"):
        reduce_tokens(model, at(0, KMedoids(Count(9))))(images)


def slow_kmeans(tokens, weight, count, rounds):
    """Weighted Lloyd iterations; an empty cluster takes the farthest token that leaves no other one empty."""
    n = len(tokens)
    centroids = [tokens[i] for i in sorted(range(n), key=lambda i: -weight[i])[:count]]
    label = []
    for _ in range(rounds):
        d = [[distance(t, c) ** 2 for c in centroids] for t in tokens]
        label = [min(range(count), key=lambda m, i=i: d[i][m]) for i in range(n)]
        own = [d[i][label[i]] for i in range(n)]
        groups = {m: [i for i in range(n) if label[i] == m] for m in range(count)}
        anchors = {min(g, key=lambda i: own[i]) for g in groups.values() if g}
        movers = sorted((i for i in range(n) if i not in anchors), key=lambda i: -own[i])
        for m in (m for m in range(count) if not groups[m]):
            label[movers.pop(0)] = m
        for m in range(count):
            members = [i for i in range(n) if label[i] == m]
            total = sum(weight[i] for i in members)
            centroids[m] = [sum(weight[i] * tokens[i][c] for i in members) / total for c in range(len(tokens[0]))]
    return label


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("rounds", [1, 5])
def test_token_pooling_is_weighted_kmeans(count, rounds):
    x, valid = ragged(24, 15, 9)
    weight = torch.rand(3, 24, dtype=torch.float64) * valid
    found = weighted_kmeans(x, weight, valid, torch.full((3,), count), count, iterations=rounds)
    for image, length in enumerate((24, 15, 9)):
        expected = slow_kmeans(x[image, :length].tolist(), weight[image].tolist(), count, rounds)
        assert found[image, :length].tolist() == expected


def test_no_cluster_of_token_pooling_is_ever_empty():
    same = torch.ones(2, 10, 3, dtype=torch.float64)
    same[1, 5:] = 2.0
    valid = torch.ones(2, 10, dtype=torch.bool)
    label = weighted_kmeans(same, torch.ones(2, 10, dtype=torch.float64), valid, torch.tensor([4, 6]), 6, iterations=5)
    assert set(label[0].tolist()) == set(range(4))
    assert set(label[1].tolist()) == set(range(6))


@pytest.mark.parametrize("reducer", [DPCKNN(Count(11)), KMedoids(Count(11)), TokenPooling(Count(11))])
@pytest.mark.parametrize("site", ["input", "attention"])
@torch.no_grad()
def test_ragged_images_alone_and_in_a_batch(reducer, site, images):
    """After ATS images differ; some then have fewer tokens than they may keep and must be left as they are."""
    reducer = type(reducer)(Count(11), site=site)
    model = make_vit().double()
    driven = reduce_tokens(model, at(0, ATS(Ratio(0.6))) | at([1, 3], reducer))
    trace = assert_same_alone_and_in_a_batch(driven, images)
    assert len(set(trace.tokens[:, 1].tolist())) > 1


@pytest.mark.parametrize("reducer", [DPCKNN(Ratio(0.5)), KMedoids(Ratio(0.5)), TokenPooling(Ratio(0.5))])
@torch.no_grad()
def test_permuting_the_patches_permutes_the_clusters(reducer):
    model = make_vit().double()
    model.pos_embed.zero_()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    order = torch.randperm(36)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 36, 8, 8)[:, :, order]
    shuffled = patches.reshape(2, 3, 6, 6, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 48, 48)
    driven = reduce_tokens(model, at([1, 3], reducer))
    first, second = driven.trace(images)[1].owner(3), driven.trace(shuffled)[1].owner(3)
    together = first[:, :, None] == first[:, None, :]
    assert torch.equal(together[:, order][:, :, order], second[:, :, None] == second[:, None, :])


@pytest.mark.parametrize("method", [DPCKNN, KMedoids, TokenPooling])
def test_what_cannot_be_is_refused(method):
    with pytest.raises(ReducerError, match="choose one of input, attention"):
        method(Ratio(0.5), site="nowhere")
    with pytest.raises(ReducerError, match="whole number"):
        method(Ratio(0.5), **{"neighbours" if method is DPCKNN else "iterations": -1})
