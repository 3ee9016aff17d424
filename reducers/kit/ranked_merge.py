"""DiffRate's reduction of tokens in a given order: drop the last, merge the next into the most similar of the first
(Chen et al., ICCV 2023). Hard for inference, and soft for the training of the counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.kit.selection import at_most
from reducers.lazy import cached_property
from reducers.maps import Mask, Merge
from reducers.tokens import Layout


@dataclass(frozen=True, eq=False)
class SimilarMerge(Merge):
    """Groups of which a member adds its size in proportion to its similarity to the token it joins."""

    share: Tensor | None = None  # (T,) that similarity; 1 for tokens that join none
    place: Tensor | None = None  # (T,) the new row of each token that joins none; for others one behind the last

    @cached_property
    def source(self) -> Tensor:
        assert self.place is not None
        rows = torch.arange(self.old.rows, device=self.place.device)
        return rows.new_zeros(self.new.rows + 1).index_copy(0, self.place, rows)[:-1]

    def total(self, values: Tensor) -> Tensor:
        assert self.share is not None
        return super().total(_times(values, self.share))


@dataclass(frozen=True, eq=False)
class SoftMerge(Mask):
    """Training only: ``SimilarMerge`` without removing anything.

    A token that joins another is added to it times ``joins`` (T,), differentiable, and otherwise hidden by ``weight``.
    """

    host: Tensor  # (T,) packed row each token joins, its own where it joins none
    joins: Tensor  # (T,) 1 for tokens that join another and 0 for others, as far as the forward pass goes
    share: Tensor  # (T,) similarity to the token it joins

    def apply(self, x: Tensor) -> Tensor:
        summed = x.index_add(0, self.host, _times(x, self.joins))
        members = torch.ones_like(self.joins).index_add(0, self.host, self.joins)
        return _times(summed, members.reciprocal())

    def total(self, values: Tensor) -> Tensor:
        return values.index_add(0, self.host, _times(values, self.joins * self.share))


def _times(values: Tensor, weight: Tensor) -> Tensor:
    """values (T, ...) times weight (T,), in the values' type."""
    return values * weight.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))


def nearest_hosts(x: Tensor, order: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """For the patches of rank ``first`` … ``last`` - 1 the most similar one of rank below ``first``.

    x (B, N, D); order (B, N): patches by rank. Returns the hosts' ranks and the cosine similarities, not below 0, both
    (B, last - first).
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    ranked = F.normalize(x.gather(1, order[:, :last, None].expand(-1, -1, x.shape[2])), dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        similarity = ranked[:, first:] @ ranked[:, :first].transpose(1, 2)
    best, host = similarity.max(dim=2)
    return host, best.clamp(min=0, max=1)


def packed(layout: Layout, order: Tensor, ranked: Tensor, *, prefix: float) -> Tensor:
    """Values by rank (B, N) as values of packed rows (T,); ``prefix`` for prefix tokens."""
    return layout.spread(torch.zeros_like(ranked).scatter(1, order, ranked), prefix=prefix)


def merge_ranked(layout: Layout, x: Tensor, order: Tensor, *, prune: int, merge: int) -> SimilarMerge:
    """Keep the first ``merge`` patches of ``order`` (B, N) in each image, add those up to ``prune`` to their most
    similar one among them, drop the others. x: (T, D). The order of tokens stays; a new token is its members' mean.
    """
    padded = layout.pad_patches(x)
    prune = min(prune, padded.shape[1])
    host, similarity = nearest_hosts(padded, order, merge, prune)
    images, patches = order.shape
    rank = torch.zeros_like(order).scatter_(1, order, torch.arange(patches, device=order.device).expand_as(order))
    stays = layout.spread(rank < merge, prefix=True)
    new = layout.leaving(at_most(layout, merge))
    place = stays.long().cumsum(0) - 1  # kept tokens stand one after another, over all images
    place = place.where(stays, new.rows)  # one row behind the last is for what is dropped
    own = layout.pad_patches(place)  # (B, N)
    by_rank = own.gather(1, order)
    joined = torch.cat([by_rank[:, :merge], by_rank.gather(1, host), by_rank[:, prune:]], dim=1)
    group = packed(layout, order, joined, prefix=0)
    group = torch.where(layout.is_prefix, place, group)
    kept, dropped = (similarity.new_ones(images, number) for number in (min(merge, patches), patches - prune))
    share = packed(layout, order, torch.cat([kept, similarity, dropped], dim=1), prefix=1.0)
    members = share.new_zeros(new.rows + 1).index_add_(0, group, torch.ones_like(share))
    weight = members.reciprocal()[group]
    none = prune >= patches
    return SimilarMerge(
        layout, new, group if none else group.where(group < new.rows, -1), weight,
        drops_none=none, share=share, place=place,
    )  # fmt: skip


def soft_merge(layout: Layout, x: Tensor, order: Tensor, kept: Tensor, alone: Tensor, *, merge: int) -> SoftMerge:
    """``merge_ranked`` with gradients for the counts; images alike. x: (T, D).

    kept, alone (N,): by rank, 1 for tokens that pruning, and that merging leaves; differentiable. A token that is kept
    and not left alone joins its most similar one of rank below ``merge``.
    """
    host, similarity = nearest_hosts(layout.pad_patches(x), order, merge, order.shape[1])
    own = torch.arange(merge, device=order.device).expand(order.shape[0], -1)
    first = (layout.starts + layout.prefix)[:, None]
    hosts = packed(layout, order, first + order.gather(1, torch.cat([own, host], dim=1)), prefix=0)
    hosts = torch.where(layout.is_prefix, torch.arange(layout.rows, device=hosts.device), hosts)
    joins = torch.cat([torch.zeros_like(kept[:merge]), (kept * (1 - alone))[merge:]])
    share = torch.cat([similarity.new_ones(order.shape[0], merge), similarity], dim=1)
    return SoftMerge(
        layout, layout, packed(layout, order, (kept * alone).expand(order.shape), prefix=1.0), hosts,
        packed(layout, order, joins.expand(order.shape), prefix=0.0), packed(layout, order, share, prefix=1.0),
    )  # fmt: skip
