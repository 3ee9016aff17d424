"""Token Pooling: weighted k-means over the tokens, each cluster becomes its centroid (Marin et al., 2021).

The paper minimises the error of reconstructing the tokens from the fewer ones, weighted by the attention they receive.
Its account here rests on memory [R]; how it starts and what becomes of empty clusters are our decisions [D].
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice, checked_whole
from reducers.decision import Decision
from reducers.kit.clustering import Site, Weights, merge_labels
from reducers.kit.selection import keep_count
from reducers.reducer import Searchable, State, TokenReducer
from reducers.registry import register
from reducers.signals import Signals


def distances_to(x: Tensor, centroid: Tensor, used: Tensor) -> Tensor:
    """Squared distances, infinite to clusters that are not ``used`` (B, M). (B, N, D), (B, M, D) -> (B, N, M)"""
    with torch.autocast(x.device.type, enabled=False):
        squared = x.square().sum(-1)[:, :, None] + centroid.square().sum(-1)[:, None] - 2 * x @ centroid.transpose(1, 2)
    return squared.clamp(min=0).masked_fill(~used[:, None], torch.inf)


def centroids(x: Tensor, weight: Tensor, label: Tensor, clusters: int) -> Tensor:
    """Weighted means of the members. x (B, N, D), weight and label (B, N) -> (B, clusters, D)"""
    images = torch.arange(x.shape[0], device=x.device)[:, None]
    group = (label + images * clusters).flatten()
    sums = x.new_zeros(x.shape[0] * clusters, x.shape[2]).index_add_(0, group, (x * weight[..., None]).flatten(0, 1))
    total = x.new_zeros(x.shape[0] * clusters).index_add_(0, group, weight.flatten())
    return (sums / total.clamp(min=torch.finfo(x.dtype).tiny)[:, None]).view(x.shape[0], clusters, x.shape[2])


def fill_empty(label: Tensor, own: Tensor, valid: Tensor, used: Tensor) -> Tensor:
    """Give every empty cluster a token of its own: those farthest from their centroids, one each [D].

    The member nearest to its centroid never leaves, so no cluster empties another. label (B, N), own (B, N) distance
    to the centroid, used (B, M) -> (B, N)
    """
    member = F.one_hot(label, used.shape[1]).bool() & valid[..., None]  # (B, N, M)
    empty = used & ~member.any(1)
    closest = own[..., None].masked_fill(~member, torch.inf).argmin(dim=1)  # (B, M)
    anchors = torch.zeros_like(label).scatter_add_(1, closest, (used & ~empty).long()) > 0
    order = own.masked_fill(anchors | ~valid, -1).sort(dim=1, descending=True, stable=True).indices
    wanting = empty.to(torch.int8).sort(dim=1, descending=True, stable=True).indices  # empty clusters first
    most = min(label.shape[1], used.shape[1])
    movers = order[:, :most]
    moves = torch.arange(most, device=label.device) < empty.sum(1, keepdim=True)
    return label.scatter(1, movers, torch.where(moves, wanting[:, :most], label.gather(1, movers)))


def weighted_kmeans(x: Tensor, weight: Tensor, valid: Tensor, count: Tensor, most: int, *, iterations: int) -> Tensor:
    """Cluster numbers 0 … M - 1 of each token after ``iterations`` rounds, none empty. (B, N) int64

    x (B, N, D) float32 or wider, weight (B, N), count (B,) = M of each image, ``most`` the largest of them. Starts
    from the heaviest tokens [D]. An image that keeps all its tokens is left as it is.
    """
    order = weight.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :most]
    centroid = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    used = torch.arange(most, device=x.device) < count[:, None]
    weight = weight.clamp(min=torch.finfo(x.dtype).tiny) * valid
    label = torch.zeros_like(valid, dtype=torch.int64)
    for left in reversed(range(max(iterations, 1))):
        own, label = distances_to(x, centroid, used).min(dim=2)
        label = fill_empty(label, own, valid, used)
        if left:
            centroid = centroids(x, weight, label, most)
    place = torch.arange(x.shape[1], device=x.device)
    return torch.where((count < valid.sum(1))[:, None], label, place)


@register("token_pooling")
class TokenPooling(TokenReducer):
    """Replace the patch tokens by the weighted centroids of a k-means clustering.

    The paper's K-Medoids form is the method ``kmedoids``. Later attention is not weighted by size. The count is fixed.

    Args:
        budget: clusters left; ``Ratio`` rounds down.
        weights: ``attention``: a token weighs what attention it received in the block before, over its heads and
            queries, so it cannot act at block 0; ``equal``: all weigh alike.
        iterations: rounds, always all of them: one that changes nothing is not noticed, so the cost is
            the same for every image.
        site: ``attention``: after the attention residual, where most methods act; the paper pools after each block,
            which is before the next one: ``input``.
    """

    summary = "weighted k-means over the tokens, each cluster becomes its centroid"
    source = "Marin et al., 2021 (arXiv 2110.03860)"
    searchable: ClassVar[Searchable] = {
        "weights": ("attention", "equal"),
        "iterations": (5, 2),
        "site": ("attention", "input"),
    }

    def __init__(
        self, budget: Budget, *, weights: Weights = "attention", iterations: int = 5, site: Site = "attention"
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "TokenPooling")
        self.weights = checked_choice(weights, Weights, "TokenPooling(weights=…)")
        self.iterations = checked_whole(iterations, "TokenPooling(iterations=…)", least=1)
        self.site = checked_choice(site, Site, "TokenPooling(site=…)")  # type: ignore[assignment]
        self.traits = replace(self.traits, uses_previous_attention=weights == "attention")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "floor")
        if counts.keep_all:
            return None
        valid, features = layout.valid_patches, signals.output()
        with torch.no_grad():
            x = layout.pad_patches(features.detach().to(torch.promote_types(features.dtype, torch.float32)))
            weight = signals.previous_attention() if self.weights == "attention" else torch.ones_like(signals.size)
            label = weighted_kmeans(
                x, layout.pad_patches(weight).to(x.dtype), valid, counts.each, counts.most,
                iterations=self.iterations,
            )  # fmt: skip
            merge = merge_labels(layout, label, counts, weight)
        if signals.counting:
            patches, kept = layout.patches.double(), counts.each.double()
            distances, means = patches * kept * x.shape[2], patches * x.shape[2]  # the last mean is the merge itself
            signals.spend(counts.busy * self.iterations * (distances + means))
        return Decision(merge)
