"""Merging in pairs: which of two sets of tokens are most alike, and the map that joins them (Bolya et al., 2023)."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_flag
from reducers.maps import Merge
from reducers.reducer import State, TokenReducer
from reducers.signals import Signals
from reducers.tokens import Counts, Layout

log = logging.getLogger(__name__)


def sum_of_heads(keys: Tensor) -> Tensor:
    """(T, H, d) -> (T, d): the head-mean key but for a factor that no cosine sees. On a CPU adding slices is several
    times faster than reducing the middle of a strided tensor; a GPU launches one kernel instead of one a head.
    """
    if keys.is_cuda:
        return keys.sum(dim=1)
    return functools.reduce(torch.add, keys.unbind(dim=1))


def bipartite_pairs(metric: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """For each even-placed token its most similar odd-placed partner. metric: (T, d) packed.

    Returns the best cosine similarity (B, A), -inf for prefix tokens and padding, and the partner's index among
    the odd places (B, A).
    """
    padded = F.normalize(layout.pad(metric), dim=-1)
    similarity = padded[:, 0::2] @ padded[:, 1::2].transpose(1, 2)
    closed = None
    if layout.uniform is None or layout.uniform[1] > 1:  # else every odd place is a patch: nothing to hide from whom
        place = torch.arange(padded.shape[1], device=metric.device)
        closed = ~layout.valid | (place < layout.prefix[:, None])
        similarity = similarity.masked_fill(closed[:, None, 1::2], -torch.inf)
    best, partner = similarity.max(dim=2)
    if closed is not None:
        best = best.masked_fill(closed[:, 0::2], -torch.inf)
    elif layout.uniform is not None and layout.uniform[1] == 1:
        best[:, 0] = -torch.inf
    return best, partner


def merge_pairs(layout: Layout, best: Tensor, partner: Tensor, pairs: Counts, size: Tensor) -> Merge:
    """Merge the ``pairs`` best pairs of each image into their odd-placed member, a mean weighted by size.

    The result is ordered [prefix, unmerged even places, odd places], each in the order it had: merging depends on
    order, and this is the published one. best, partner: (B, A); size: (T,) float32.
    """
    order = best.sort(dim=1, descending=True, stable=True).indices
    new = layout.leaving(pairs.left)
    if pairs.alike is not None and (layout.lead or 0) <= 1:
        return _weighted(layout, new, _places_of_alike(order, partner, pairs.alike, layout.longest), size)
    ranks = torch.arange(order.shape[1], device=order.device)
    merged = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    merged.scatter_(1, order, (ranks < pairs.each[:, None]).expand(order.shape))  # (B, A)

    width = layout.longest
    place = torch.arange(width, device=order.device)
    movable = layout.valid & (place >= layout.prefix[:, None])
    even, odd = movable[:, 0::2] & ~merged, movable[:, 1::2]
    new_even = layout.prefix[:, None] + even.long().cumsum(1) - 1
    new_odd = (layout.prefix + even.sum(1))[:, None] + odd.long().cumsum(1) - 1
    new_even = torch.where(merged, new_odd.gather(1, partner), new_even)
    if pairs.alike is None:  # an image that merges nothing keeps its order, as it would alone
        movable = movable & (pairs.each > 0)[:, None]
    target = place.expand(layout.images, -1).clone()  # prefix tokens stay where they are
    target[:, 0::2] = torch.where(movable[:, 0::2], new_even, target[:, 0::2])
    target[:, 1::2] = torch.where(movable[:, 1::2], new_odd, target[:, 1::2])
    return _weighted(layout, new, target, size)


def _places_of_alike(order: Tensor, partner: Tensor, count: int, tokens: int) -> Tensor:
    """(B, L) where each token goes, in a fraction of the general way's steps: images alike, and at most a class token
    before the patches, which then leads the unmerged even places by itself.
    """
    odd = torch.arange(tokens // 2, device=order.device) + (order.shape[1] - count)
    target = order.new_empty(order.shape[0], tokens)
    target[:, 1::2] = odd
    stay = order[:, count:].sort(dim=1).values
    even = torch.empty_like(order)
    even.scatter_(1, stay, torch.arange(stay.shape[1], device=order.device).expand(stay.shape))
    merged = order[:, :count]
    even.scatter_(1, merged, odd[0] + partner.gather(1, merged))
    target[:, 0::2] = even
    return target


def _weighted(layout: Layout, new: Layout, target: Tensor, size: Tensor) -> Merge:
    """The map to the new places ``target`` (B, L), each group a mean weighted by size."""
    group = layout.unpad(target + new.starts[:, None])
    sums = torch.zeros(new.rows, dtype=size.dtype, device=size.device).index_add_(0, group, size)
    return Merge(layout, new, group, size / sums[group], drops_none=True)


class PairMerging(TokenReducer):
    """What methods have in common that merge so many of an image's tokens in pairs as the ``budget`` leaves too many.

    At most half the tokens can merge in one block: a larger request is cut to that, with a warning. ``Ratio`` rounds
    up what stays. ``proportional``: later attention is weighted by size.
    """

    scheduled_as = "drop"
    budgets = ("drop", "ratio", "count")

    def __init__(self, budget: Budget, *, proportional: bool = True) -> None:
        super().__init__()
        self.budget = checked_budget(budget, type(self).__name__)
        self.proportional = checked_flag(proportional, f"{type(self).__name__}(proportional=…)")
        self._warned = False

    def matched(self, signals: Signals, state: State) -> Merge | None:
        """The most similar pairs of neighbouring sets, by the head-mean keys, as a merge; None where none merges."""
        layout = signals.layout
        pairs = self.pairs(layout, state)
        if pairs.most == 0:
            return None
        with torch.no_grad():
            metric = sum_of_heads(signals.keys().detach())
            best, partner = bipartite_pairs(metric, layout)
            size = signals.size.to(torch.promote_types(metric.dtype, torch.float32))
            merge = merge_pairs(layout, best, partner, pairs, size)
        if signals.counting:
            tokens = layout.lengths.double() * (pairs.each > 0)
            signals.spend((tokens / 2).ceil() * (tokens / 2).floor() * metric.shape[1])
            signals.spend(tokens * signals.values().shape[1:].numel())
        return merge

    def pairs(self, layout: Layout, state: State) -> Counts:
        """How many pairs merge in each image."""

        def too_many(patches: int, prefix: int) -> int:
            return patches - self.budget.count(patches, initial=state.initial, prefix=prefix, rounding="ceil")

        self._warn_if_cut(any(too_many(*kind) > kind[0] // 2 for kind in layout.kinds), state.block)
        return Counts.by(layout, lambda patches, prefix: min(too_many(patches, prefix), patches // 2))

    def _warn_if_cut(self, cut: bool, block: int) -> None:
        if cut and not self._warned:
            log.warning(
                "%s can merge at most half the tokens in one block; the budget at block %d is cut to that",
                type(self).__name__,
                block,
            )
            self._warned = True
