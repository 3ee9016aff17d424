"""BAT: attentive tokens stay, alike ones are merged, and the inattentive are clustered (Long et al., CVPR 2023; methods
13).

No code of the authors' could be read: what is built here follows their description [R], and where that leaves a
choice, it is ours [D].
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_share, checked_whole
from reducers.decision import Decision
from reducers.kit.clustering import density_peaks, labels_of, merge_labels, nearest_centre, squared_distances
from reducers.kit.selection import busy, count_each, keep_count, keeps_all, rank_patches
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.scores import class_attention
from reducers.signals import Signals
from reducers.tokens import Layout

N = TypeVar("N", Tensor, int)  # counts of each image (B,), or of one on the host

_NEIGHBOURS = 5


@dataclass(frozen=True)
class Shares:
    """How an image's patches are dealt with, numbers or (B,) int64; ``attentive - pairs + clusters`` are left."""

    attentive: Tensor | int  # the patches of highest class attention
    pairs: Tensor | int  # how many of them merge into another one of them
    clusters: Tensor | int  # what the inattentive ones become


def share_out(patches: N, count: N, *, clusters: int, alike: Fraction) -> Shares:
    """So that ``count`` of ``patches`` tokens are left: at most half of them clusters, and of the others a share
    ``alike`` has taken one in, as far as there are patches for it.
    """
    clustered = _least((count + 1) // 2, clusters)
    alone = count - clustered
    pairs = _least(alone * alike.numerator // alike.denominator, patches - count)
    return Shares(alone + pairs, pairs, clustered)


def _least(first: N, second: N | int) -> N:
    if isinstance(first, Tensor):
        return torch.minimum(first, torch.as_tensor(second, device=first.device))
    return min(first, int(second))


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
    attentive, pairs, clusters = (count_each(layout, n) for n in (shares.attentive, shares.pairs, shares.clusters))
    known = isinstance(shares.attentive, int)  # then the ranks fall into two parts; else each is looked at by both ways
    last, first = (shares.attentive, shares.attentive) if isinstance(shares.attentive, int) else (order.shape[1], 0)

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
    label = torch.cat([near, far], dim=1) if known else torch.where(inattentive, far, near)
    back = torch.zeros_like(order).scatter(1, order, rank.expand(order.shape))  # the rank of each patch
    return label.gather(1, back), inattentive.gather(1, back)


@register("bat")
class BAT(TokenReducer):
    """Keep the patches the class token attends to, merge near duplicates among them, and cluster the others.

    The patches are split by class attention. The inattentive become ``clusters`` tokens (at most half of what is left)
    by density peaks with five neighbours, as in DPC-KNN: means weighted by attention. Among the attentive, alternate
    ranks form two sets, and the most similar pairs merge, a mean weighted by size; ``alike`` is the share of the
    attentive tokens left that have taken one in. So the number that leaves is the budget's exactly. ``Ratio`` rounds
    up. That there are 10 clusters, that pairs are matched by the cosine of the features between alternate ranks, and
    how many, is our decision [D]; the rest is from memory [R]. The attentive come first, in their order in the image,
    then the clusters. Published at blocks 3, 6 and 9 with about 0.7 [R]. Acts after the attention residual; the count
    is fixed. It has no parameters and works off the shelf; its authors train with it [R].
    """

    summary = "keep attentive tokens, merge alike ones, cluster the rest"
    source = "Long et al., CVPR 2023 (arXiv 2211.11315), from its description"
    traits = Traits(needs_class_token=True)

    def __init__(self, budget: Budget, *, clusters: int = 10, alike: float = 0.1) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "BAT")
        self.clusters = checked_whole(clusters, "BAT(clusters=…)", least=1)
        self.alike = checked_share(alike, "BAT(alike=…)")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        count = keep_count(layout, self.budget, state, "ceil")
        if keeps_all(layout, count):
            return None
        attention, x = class_attention(signals.class_attention()), signals.output()
        shares = self._shares(layout, count)
        with torch.no_grad():
            label, inattentive = decouple(layout, layout.pad_patches(x), rank_patches(layout, attention), shares)
            if not isinstance(count, int):  # an image that keeps all keeps its order, as it would alone
                place = torch.arange(label.shape[1], device=label.device)
                label = label.where((count < layout.patches)[:, None], place)
            weight = torch.where(layout.spread(inattentive, prefix=False), attention, signals.size)
            merge = merge_labels(layout, label, count, weight)
        if signals.counting:
            patches = layout.patches.double()
            attentive = count_each(layout, shares.attentive).double()
            pairs = (attentive / 2).ceil() * (attentive / 2).floor()
            signals.spend(busy(layout, count) * ((patches - attentive) ** 2 + pairs + patches) * x.shape[1])
        return Decision(merge)

    def _shares(self, layout: Layout, count: Tensor | int) -> Shares:
        """For each image alike where all are."""
        alike = Fraction(str(self.alike)).limit_denominator(1000)
        if isinstance(count, int):
            patches = layout.width_from(layout.prefix)
            return share_out(patches, count, clusters=self.clusters, alike=alike)
        return share_out(layout.patches, count, clusters=self.clusters, alike=alike)
