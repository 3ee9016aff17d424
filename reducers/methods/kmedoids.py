"""K-Medoids: keep the tokens that stand for their clusters (Marin et al., 2021; Haurum et al., ICCVW 2023).

Alternates between giving every token to its nearest medoid and making the member with the smallest weighted sum of
distances the new medoid: the objective, the weighted distance of all tokens to their medoids, never grows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice, checked_whole
from reducers.decision import Decision
from reducers.kit.clustering import Site, Weights, nearest_centre, squared_distances
from reducers.kit.selection import first_of, keep_count
from reducers.maps import keep_patches, keep_ranked
from reducers.reducer import Searchable, State, TokenReducer
from reducers.registry import register
from reducers.signals import Signals


def heaviest(weight: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (B,) heaviest tokens, (B, N) bool; ties go to the lower index."""
    order = weight.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return first_of(order, count) & valid


def far_apart(distance: Tensor, valid: Tensor, count: Tensor, most: int) -> Tensor:
    """Farthest-point choice of ``count`` (B,) tokens, at most ``most`` of them, (B, N) bool.

    Starts from the token nearest to all others, not from a random one, so that the result is an image's own [D].
    """
    inner = distance.masked_fill(distance.isinf(), 0)
    first = inner.sum(2).masked_fill(~valid, torch.inf).argmin(dim=1, keepdim=True)
    chosen = torch.zeros_like(valid).scatter(1, first, 1)
    gap = inner.gather(1, first[..., None].expand(-1, -1, distance.shape[2])).squeeze(1)
    for taken in range(1, most):
        gap = gap.masked_fill(chosen | ~valid, -torch.inf)
        after = gap.argmax(dim=1, keepdim=True)
        grows = (count > taken)[:, None]
        chosen = chosen | (torch.zeros_like(chosen).scatter(1, after, 1) & grows)
        gap = torch.minimum(gap, inner.gather(1, after[..., None].expand(-1, -1, distance.shape[2])).squeeze(1))
    return chosen & valid


def better_medoids(distance: Tensor, weight: Tensor, valid: Tensor, medoid: Tensor) -> Tensor:
    """One step: assign, then in each cluster the member with the smallest weighted sum of distances. (B, N) bool"""
    place = torch.arange(medoid.shape[1], device=medoid.device)
    owner = nearest_centre(distance, medoid).masked_fill(~valid, -1)  # (B, N)
    together = owner[:, :, None] == owner[:, None, :]
    cost = (distance.masked_fill(distance.isinf(), 0) * weight[:, None, :] * together).sum(2)  # (B, N)
    candidates = cost[:, None].masked_fill(owner[:, None] != place[:, None], torch.inf)  # (B, medoid, member)
    best = candidates.argmin(dim=2)
    votes = torch.zeros_like(owner).scatter_add_(1, best, medoid.long())  # rows of no medoid vote for nothing
    return votes > 0


@register("kmedoids")
class KMedoids(TokenReducer):
    """Keep the medoids of a clustering of the patch tokens: a selection, features are not averaged.

    Euclidean distances between features. The count is fixed.

    Args:
        budget: medoids kept; ``Ratio`` rounds down.
        weights: ``attention``: a token weighs what attention it received in the block before, over its heads and
            queries, and the heaviest tokens start as medoids, so it cannot act at block 0; ``equal``: all weigh alike,
            and the start is a farthest-point choice.
        iterations: rounds of assigning tokens and choosing medoids anew.
        site: ``attention``: after the attention residual, where most methods act, so that a comparison is one of
            choices; ``input`` is the published place, before the block.
    """

    summary = "keep the medoids of a clustering"
    source = "Marin et al., 2021 (arXiv 2110.03860); Haurum et al., ICCVW 2023"
    searchable: ClassVar[Searchable] = {
        "weights": ("attention", "equal"),
        "iterations": (3, 1),
        "site": ("attention", "input"),
    }

    def __init__(
        self, budget: Budget, *, weights: Weights = "attention", iterations: int = 3, site: Site = "attention"
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "KMedoids")
        self.weights = checked_choice(weights, Weights, "KMedoids(weights=…)")
        self.iterations = checked_whole(iterations, "KMedoids(iterations=…)", least=0)
        self.site = checked_choice(site, Site, "KMedoids(site=…)")  # type: ignore[assignment]
        self.traits = replace(self.traits, uses_previous_attention=weights == "attention")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "floor")
        if counts.keep_all:
            return None
        valid = layout.valid_patches
        x = layout.pad_patches(signals.output())
        with torch.no_grad():
            distance = squared_distances(x, valid).sqrt()
            if self.weights == "attention":
                weight = layout.pad_patches(signals.previous_attention()).to(distance.dtype)
                medoid = heaviest(weight, valid, counts.each)
            else:
                weight = valid.to(distance.dtype)
                medoid = far_apart(distance, valid, counts.each, counts.most)
            for _ in range(self.iterations):
                medoid = better_medoids(distance, weight, valid, medoid)
        if signals.counting:
            patches = layout.patches.double()
            work = patches**2 * (x.shape[2] + self.iterations)  # distances, weighted sums
            signals.spend(counts.busy * work)
        if counts.alike is not None:
            order = medoid.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
            return Decision(keep_ranked(layout, order, counts.alike))
        return Decision(keep_patches(layout, medoid))
