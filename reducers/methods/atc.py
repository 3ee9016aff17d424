"""ATC: agglomerative token clustering (Haurum et al., 2024).

Bottom-up: the two nearest clusters become one until M are left. Distances between clusters follow from those of their
parts (Lance and Williams, 1967), and each cluster remembers its nearest other one, so a step costs O(N) and not O(N^2).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice, checked_flag
from reducers.decision import Decision
from reducers.kit.clustering import labels_of, merge_labels
from reducers.kit.selection import keep_count
from reducers.reducer import Searchable, State, TokenReducer
from reducers.registry import register
from reducers.signals import Signals

Linkage = Literal["single", "average", "complete"]


def cosine_distances(metric: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine similarity of each image's patches, infinite on the diagonal and to padding. (B, N, d) -> (B, N, N)

    Exactly symmetric, float32 or wider whatever the precision around it.
    """
    metric = F.normalize(metric.detach().to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    with torch.autocast(metric.device.type, enabled=False):
        distance = 1 - metric @ metric.transpose(1, 2)
    distance = 0.5 * (distance + distance.transpose(1, 2))
    own = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    return distance.masked_fill(own | ~(valid[:, :, None] & valid[:, None, :]), torch.inf)


def joined(first: Tensor, second: Tensor, linkage: Linkage, members: tuple[Tensor, Tensor]) -> Tensor:
    """Distances of a union from those of its two parts (B, N); ``members`` (B, 1): how many tokens each part has."""
    if linkage == "single":
        return torch.minimum(first, second)
    if linkage == "complete":
        return torch.maximum(first, second)
    return (members[0] * first + members[1] * second) / (members[0] + members[1])


def _refresh(distance: Tensor, least: Tensor, nearest: Tensor, stale: Tensor) -> tuple[Tensor, Tensor]:
    """Row minima (B, N) and where they are, worked out anew for the ``stale`` rows.

    Where asking which rows those are would mean waiting for a device, or a graph is being captured, all are.
    """
    if stale.device.type != "cpu" or torch.compiler.is_compiling():
        value, where = distance.min(dim=2)
        return value, where
    rows = stale.flatten().nonzero().squeeze(1)
    value, where = distance.flatten(0, 1).index_select(0, rows).min(dim=1)
    return (
        least.flatten().index_copy(0, rows, value).view_as(least),
        nearest.flatten().index_copy(0, rows, where).view_as(nearest),
    )


def agglomerate(distance: Tensor, steps: Tensor, most: int, linkage: Linkage) -> Tensor:
    """Join the two nearest clusters ``steps`` times; each cluster is named by its first member. (B, N) int64

    distance (B, N, N): symmetric, infinite on the diagonal and to padding. steps (B,): joins of each image, ``most``
    the largest of them. Of equally near pairs the first is joined.
    """
    distance = distance.clone()
    images, tokens = distance.shape[:2]
    place = torch.arange(tokens, device=distance.device)
    each = torch.arange(images, device=distance.device)
    owner = place.expand(images, -1).clone()
    members = distance.new_ones(images, tokens)
    least, nearest = distance.min(dim=2)
    for step in range(most):
        goes_on = (steps > step)[:, None]  # (B, 1)
        row = least.argmin(dim=1, keepdim=True)
        other = nearest.gather(1, row)
        stays, goes = torch.minimum(row, other), torch.maximum(row, other)  # (B, 1)
        parts = members.gather(1, stays), members.gather(1, goes)
        union = joined(distance[each, stays[:, 0]], distance[each, goes[:, 0]], linkage, parts)  # (B, N)
        # the distance to itself, and to the cluster that is gone, is infinite; so it already is to those gone before
        union = union.masked_fill((place == stays) | (place == goes), torch.inf)
        if linkage == "average":  # infinite is infinite, however many it is the mean of
            union = torch.where(union.isnan(), torch.inf, union)
        union = torch.where(goes_on, union, distance[each, stays[:, 0]])
        gone = torch.where(goes_on, torch.inf, distance[each, goes[:, 0]])
        distance[each, stays[:, 0]] = union
        distance[each, :, stays[:, 0]] = union
        gone = torch.where(place == stays, torch.where(goes_on, torch.inf, union.gather(1, goes)), gone)
        distance[each, goes[:, 0]] = gone
        distance[each, :, goes[:, 0]] = gone
        members = members.scatter_add(1, stays, torch.where(goes_on, parts[1], torch.zeros_like(parts[1])))
        owner = torch.where(goes_on & (owner == goes), stays, owner)
        stale = (nearest == stays) | (nearest == goes) | (place == stays) | (place == goes)
        least, nearest = _refresh(distance, least, nearest, stale & goes_on)
    return owner


@register("atc")
class ATC(TokenReducer):
    """Cluster the patch tokens bottom-up until ``budget`` clusters are left; each becomes its size-weighted mean.

    Distance: 1 - cosine of the head-mean keys. A token counts once in a linkage, however many patches it stands for
    [D]. The new tokens stand in the order of their first members. Any count can be reached in one block; it is fixed.
    Acts after the attention residual.

    Args:
        budget: clusters left; ``Ratio`` rounds down.
        linkage: how far apart two clusters are: their nearest members (``single``), their farthest (``complete``), or
            the mean over all pairs (``average``).
        proportional: later attention is weighted by size, as in ToMe.
    """

    summary = "cluster bottom-up, merge each cluster"
    source = "Haurum et al., ECCV 2024 (arXiv 2409.11923)"
    searchable: ClassVar[Searchable] = {"linkage": ("average", "complete", "single"), "proportional": (True, False)}

    def __init__(self, budget: Budget, *, linkage: Linkage = "average", proportional: bool = True) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "ATC")
        self.linkage: Linkage = checked_choice(linkage, Linkage, "ATC(linkage=…)")  # type: ignore[assignment]
        self.proportional = checked_flag(proportional, "ATC(proportional=…)")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "floor")
        if counts.keep_all:
            return None
        valid = layout.valid_patches
        with torch.no_grad():
            metric = layout.pad_patches(signals.keys().detach().mean(dim=1))
            steps = counts.left
            owner = agglomerate(cosine_distances(metric, valid), steps.each, steps.most, self.linkage)
            alive = (owner == torch.arange(owner.shape[1], device=owner.device)) & valid
            merge = merge_labels(layout, labels_of(owner, alive), counts, signals.size)
        if signals.counting:
            patches, reduces = layout.patches.double(), counts.busy
            signals.spend(reduces * patches**2 * metric.shape[2])
            if self.linkage == "average":  # a weighted sum of two rows at each step
                signals.spend(2 * steps.each * patches)
            signals.spend(reduces * patches * signals.values().shape[1:].numel())  # means
        return Decision(merge, proportional=self.proportional)
