"""BAT: attentive tokens stay, alike ones are merged, and the inattentive are clustered (Long et al., CVPR 2023).

No code of the authors' could be read: what is built here follows their description [R], and where that leaves a
choice, it is ours [D].
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_share, checked_whole
from reducers.decision import Decision
from reducers.kit.clustering import density_peaks, labels_of, merge_labels, nearest_centre, squared_distances
from reducers.kit.selection import keep_count, rank_patches
from reducers.reducer import Searchable, State, TokenReducer, Traits
from reducers.registry import register
from reducers.scores import class_attention
from reducers.signals import Signals
from reducers.tokens import Counts, Layout

_NEIGHBOURS = 5


@dataclass(frozen=True)
class Shares:
    """How each image's patches are dealt with; ``attentive - pairs + clusters`` are left."""

    attentive: Counts  # the patches of highest class attention
    pairs: Counts  # how many of them merge into another one of them
    clusters: Counts  # what the inattentive ones become


class Split(NamedTuple):
    """The same for one image."""

    attentive: int
    pairs: int
    clusters: int


def share_out(patches: int, count: int, *, clusters: int, alike: Fraction) -> Split:
    """So that ``count`` of ``patches`` tokens are left: at most half of them clusters, and of the others a share
    ``alike`` has taken one in, as far as there are patches for it.
    """
    clustered = min((count + 1) // 2, clusters)
    alone = count - clustered
    pairs = min(alone * alike.numerator // alike.denominator, patches - count)
    return Split(alone + pairs, pairs, clustered)


def shares_of(counts: Counts, *, clusters: int, alike: Fraction) -> Shares:
    """How ``counts`` tokens of each image come to be left."""

    def part(which: int) -> Counts:
        return counts.map(lambda patches, count: share_out(patches, count, clusters=clusters, alike=alike)[which])

    return Shares(part(0), part(1), part(2))


def alike_pairs(x: Tensor, attentive: Tensor, pairs: Tensor) -> Tensor:
    """The rank whose token each attentive one joins, its own for those that stay: (B, A) int64.

    x (B, A, D) in the order of attention; attentive, pairs (B,). Each of the ranks 1, 3, 5, … looks for the most
    similar of the ranks 0, 2, 4, … (cosine), and the ``pairs`` that found the most similar ones join them.
    """
    rank = torch.arange(x.shape[1], device=x.device)
    target = rank.expand(x.shape[:2]).clone()
    if x.shape[1] < 2:
        return target
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=2)
    with torch.autocast(x.device.type, enabled=False):
        alike = unit[:, 1::2] @ unit[:, 0::2].transpose(1, 2)
    inside = rank < attentive[:, None]
    best, host = alike.masked_fill(~inside[:, None, 0::2], -torch.inf).max(dim=2)
    order = best.masked_fill(~inside[:, 1::2], -torch.inf).sort(dim=1, descending=True, stable=True).indices
    joins = torch.zeros_like(order, dtype=torch.bool)
    joins.scatter_(1, order, (rank[: order.shape[1]] < pairs[:, None]).expand(order.shape))
    target[:, 1::2] = torch.where(joins, 2 * host, target[:, 1::2])
    return target


def decouple(layout: Layout, x: Tensor, order: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """The new place of each patch, (B, N) int64, and which patches are inattentive, (B, N) bool.

    x (B, N, D); order (B, N): patches from most to least attended. The attentive tokens that are left come first, in
    their order in the image, then the clusters.
    """
    rank = torch.arange(order.shape[1], device=order.device)
    ranked = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    attentive, pairs, clusters = shares.attentive.each, shares.pairs.each, shares.clusters.each
    known = shares.attentive.alike  # then the ranks fall into two parts; else each is looked at by both ways
    last, first = (order.shape[1], 0) if known is None else (known, known)

    target = alike_pairs(ranked[:, :last], attentive, pairs)
    stays = torch.zeros_like(order, dtype=torch.bool)
    stays.scatter_(1, order[:, :last], (target == rank[:last]) & (rank[:last] < attentive[:, None]))
    place = (stays.long().cumsum(1) - 1).gather(1, order[:, :last])  # of each rank that stays
    near = place.gather(1, target)

    rest = (rank[first:] >= attentive[:, None]) & (rank[first:] < layout.patches[:, None])
    squared = squared_distances(ranked[:, first:], rest) / x.shape[2]
    centre = density_peaks(squared, rest, clusters, neighbours=_NEIGHBOURS)
    far = (attentive - pairs)[:, None] + labels_of(nearest_centre(squared, centre), centre)

    inattentive = (rank >= attentive[:, None]).expand(order.shape)
    label = torch.where(inattentive, far, near) if known is None else torch.cat([near, far], dim=1)
    back = torch.zeros_like(order).scatter(1, order, rank.expand(order.shape))  # the rank of each patch
    return label.gather(1, back), inattentive.gather(1, back)


@register("bat")
class BAT(TokenReducer):
    """Keep the patches the class token attends to, merge near duplicates among them, and cluster the others.

    The patches are split by class attention. The inattentive become clusters by density peaks with five neighbours, as
    in DPC-KNN: means weighted by attention. Among the attentive, alternate ranks form two sets, and the most similar
    pairs merge, a mean weighted by size. So the number that leaves is the budget's exactly. That there are 10 clusters,
    that pairs are matched by the cosine of the features between alternate ranks, and how many, is our decision [D]; the
    rest is from memory [R]. The attentive come first, in their order in the image, then the clusters. Published at
    blocks 3, 6 and 9 with about 0.7 [R]. Acts after the attention residual; the count is fixed. It has no parameters
    and works off the shelf; its authors train with it [R].

    Args:
        budget: tokens left; ``Ratio`` rounds up.
        clusters: tokens made of the inattentive, at most half of what is left.
        alike: share of the attentive tokens left that have taken one in.
    """

    summary = "keep attentive tokens, merge alike ones, cluster the rest"
    source = "Long et al., CVPR 2023 (arXiv 2211.11315), from its description"
    traits = Traits(needs_class_token=True)
    searchable: ClassVar[Searchable] = {"clusters": (10, 5, 20), "alike": (0.1, 0.0, 0.3)}

    def __init__(self, budget: Budget, *, clusters: int = 10, alike: float = 0.1) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "BAT")
        self.clusters = checked_whole(clusters, "BAT(clusters=…)", least=1)
        self.alike = checked_share(alike, "BAT(alike=…)")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "ceil")
        if counts.keep_all:
            return None
        attention, x = class_attention(signals.class_attention()), signals.output()
        alike = Fraction(str(self.alike)).limit_denominator(1000)
        shares = shares_of(counts, clusters=self.clusters, alike=alike)
        with torch.no_grad():
            label, inattentive = decouple(layout, layout.pad_patches(x), rank_patches(layout, attention), shares)
            if counts.alike is None:  # an image that keeps all keeps its order, as it would alone
                place = torch.arange(label.shape[1], device=label.device)
                label = label.where((counts.each < layout.patches)[:, None], place)
            weight = torch.where(layout.spread(inattentive, prefix=False), attention, signals.size)
            merge = merge_labels(layout, label, counts, weight)
        if signals.counting:
            patches = layout.patches.double()
            attentive = shares.attentive.each.double()
            pairs = (attentive / 2).ceil() * (attentive / 2).floor()
            signals.spend(counts.busy * ((patches - attentive) ** 2 + pairs + patches) * x.shape[1])
        return Decision(merge)
