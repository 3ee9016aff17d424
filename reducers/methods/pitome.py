"""PiToMe: protect the informative tokens, merge the redundant ones (Tran et al., NeurIPS 2024).

A token that is like many others has a high energy and may be merged; one that is like few is protected.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget
from reducers.checks import checked_whole
from reducers.decision import Decision
from reducers.kit.clustering import merge_labels
from reducers.kit.pairs import PairMerging
from reducers.reducer import Searchable, State
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Layout


def margin_at(block: int, depth: int) -> float:
    """How alike two tokens must be to count as alike: 0.75 at the first block, falling to 0."""
    return 0.75 * (1 - block / depth)


def energy(metric: Tensor, valid: Tensor, *, margin: float) -> Tensor:
    """Mean over an image's tokens j of elu(cos_ij - margin), the token itself included; padding gets -inf.

    metric (B, N, d), of length 1; valid (B, N) -> (B, N)
    """
    with torch.autocast(metric.device.type, enabled=False):
        alike = F.elu(metric @ metric.transpose(1, 2) - margin).masked_fill(~valid[:, None], 0)
    return (alike.sum(2) / valid.sum(1).clamp(min=1)[:, None]).masked_fill(~valid, -torch.inf)


def merge_by_rank(layout: Layout, metric: Tensor, order: Tensor, pairs: Tensor) -> Tensor:
    """The new place of each patch: of the first 2r in ``order``, alternate ranks form two sets, and each token of
    the first joins the most similar one of the second.

    The result is ordered [protected, second set], each by rank, as published. metric (B, N, d) of length 1, order
    (B, N), pairs (B,) = r of each image -> (B, N). An image that merges nothing keeps its order.
    """
    ranked = metric.gather(1, order[..., None].expand(-1, -1, metric.shape[2]))
    with torch.autocast(metric.device.type, enabled=False):
        alike = ranked[:, 0::2] @ ranked[:, 1::2].transpose(1, 2)
    rank = torch.arange(order.shape[1], device=order.device)
    open_ = rank[: alike.shape[2]] < pairs[:, None]
    partner = alike.masked_fill(~open_[:, None], -torch.inf).argmax(dim=2)  # (B, first set)
    protected = (layout.patches - 2 * pairs)[:, None]
    half = (rank // 2).expand(order.shape)
    host = torch.where(rank % 2 == 1, half, partner.gather(1, half))
    place = torch.where(rank >= 2 * pairs[:, None], rank - 2 * pairs[:, None], protected + host)
    label = torch.zeros_like(order).scatter(1, order, place)
    return torch.where(pairs[:, None] > 0, label, rank)


def merge_best_pairs(layout: Layout, metric: Tensor, order: Tensor, pairs: Tensor) -> Tensor:
    """The new place of each patch where nobody is protected: ranks alternate between two sets, and the ``pairs`` tokens
    of the first that are most like one of the second join it.

    Ordered [first set without the merged, second set], each by rank [D]. Arguments and result as in ``merge_by_rank``.
    """
    ranked = metric.gather(1, order[..., None].expand(-1, -1, metric.shape[2]))
    rank = torch.arange(order.shape[1], device=order.device)
    real = rank < layout.patches[:, None]
    with torch.autocast(metric.device.type, enabled=False):
        alike = ranked[:, 0::2] @ ranked[:, 1::2].transpose(1, 2)
    best, partner = alike.masked_fill(~real[:, None, 1::2], -torch.inf).max(dim=2)
    candidates = best.masked_fill(~real[:, 0::2], -torch.inf).sort(dim=1, descending=True, stable=True).indices
    merged = torch.zeros_like(best, dtype=torch.bool)
    merged.scatter_(1, candidates, rank[: best.shape[1]] < pairs[:, None])
    alone = real[:, 0::2] & ~merged
    second = alone.sum(1, keepdim=True) + rank[: alike.shape[2]]  # (B, second set)
    place = torch.zeros_like(order)
    place[:, 1::2] = second
    place[:, 0::2] = torch.where(merged, second.gather(1, partner), alone.long().cumsum(1) - 1)
    label = torch.zeros_like(order).scatter(1, order, place)
    return torch.where(pairs[:, None] > 0, label, rank)


@register("pitome")
class PiToMe(PairMerging):
    """Merge the tokens of highest energy pairwise, protect the others.

    Metric: cosine of the patches' head-mean keys. Of the 2r tokens of highest energy each second one, by rank, is
    merged into the most similar of the rest of them, a mean weighted by size. At most half the tokens can merge in one
    block: a larger request is cut to that, with a warning. Acts after the attention residual. The count is fixed.

    Args:
        budget: ``Drop(r)``, or what stays; ``Ratio`` rounds that up.
        proportional: later attention is weighted by size; off by default, as in the authors' code.
        bipartite: in so many of the network's first blocks nobody is protected: all patches are ranked by energy and
            dealt out to two sets in turn, and the r best pairs between them merge; how many blocks the authors mean is
            not known to us, so none is the default [D].
    """

    summary = "merge redundant tokens, protect informative ones"
    source = "Tran et al., NeurIPS 2024 (arXiv 2405.16148)"
    searchable: ClassVar[Searchable] = {"proportional": (False, True)}

    def __init__(self, budget: Budget, *, proportional: bool = False, bipartite: int = 0) -> None:
        super().__init__(budget, proportional=proportional)
        self.bipartite = checked_whole(bipartite, "PiToMe(bipartite=…)", least=0)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        pairs = self.pairs(layout, state)
        if pairs.most == 0:
            return None
        with torch.no_grad():
            keys = layout.pad_patches(signals.keys().detach().mean(dim=1))
            metric = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
            valid = layout.valid_patches
            redundant = energy(metric, valid, margin=margin_at(state.block, state.depth))
            order = redundant.sort(dim=1, descending=True, stable=True).indices
            merging = merge_best_pairs if state.block < self.bipartite else merge_by_rank
            label = merging(layout, metric, order, pairs.each)
            merge = merge_labels(layout, label, pairs.left, signals.size)
        if signals.counting:
            patches = layout.patches.double() * (pairs.each > 0)
            halves = (patches / 2).ceil() * (patches / 2).floor()
            signals.spend((patches**2 + halves) * metric.shape[2])
            signals.spend(patches * signals.values().shape[1:].numel())
        return Decision(merge, proportional=self.proportional)
