"""Zero-TPrune: PageRank on the attention graph, then pruning by similarity and by importance (Wang et al., CVPR 2024).

No code is public; the iteration counts, the variance filter and how a budget is split between the two kinds of pruning
rest on memory [R] or are our decisions [D], as noted.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_share, checked_whole
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.selection import first_of, keep_count, keep_highest
from reducers.reducer import Searchable, State, TokenReducer
from reducers.registry import register
from reducers.signals import Signals


def page_rank(attention: Tensor, valid: Tensor, *, iterations: int) -> Tensor:
    """Power iteration s <- A^T s on each head's attention graph, from equal scores that sum to 1. (B, H, L)

    attention (B, H, L, L): rows are queries and sum to 1; padding is 0. valid (B, L). What many important tokens
    attend to is important.
    """
    start = valid.to(attention.dtype) / valid.sum(1).clamp(min=1)[:, None]
    score = start[:, None].expand(-1, attention.shape[1], -1)
    with torch.autocast(attention.device.type, enabled=False):
        for _ in range(iterations):
            score = (score[:, :, None] @ attention).squeeze(2)
            score = score / score.sum(2, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
    return score


def combine_heads(score: Tensor, valid: Tensor, *, low: float, high: float) -> Tensor:
    """Root of the mean square over the heads whose variance lies in [low, high], over all where none does [D].

    The variance is that of scores scaled to mean 1 [D]: below ``low`` a head tells nothing apart, above ``high`` it
    sees a single token. score (B, H, L) -> (B, L)
    """
    tokens = valid.sum(1).clamp(min=1)[:, None].to(score.dtype)  # (B, 1)
    off = (score * tokens[..., None] - 1).masked_fill(~valid[:, None], 0)
    variance = off.square().sum(2) / tokens
    passes = (variance >= low) & (variance <= high)
    passes = passes | ~passes.any(dim=1, keepdim=True)
    mean = (score.square() * passes[..., None]).sum(1) / passes.sum(1, keepdim=True)
    return mean.sqrt()


def rounds_at(block: int, depth: int) -> int:
    """Power iterations at a block: 30 in the first third, where attention is diffuse, then 5, and 1 in the last [R]."""
    if block >= depth - 1:
        return 1
    return 30 if 3 * block < depth else 5


def most_alike(metric: Tensor, order: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (B,) tokens of the less important set most similar to one of the more important set. (B, N) bool

    order (B, N): patches by falling importance; alternate ranks form the sets, the first starting with the most
    important. metric (B, N, d). Similarity: cosine.
    """
    ranked = F.normalize(metric.gather(1, order[..., None].expand(-1, -1, metric.shape[2])), dim=-1)
    with torch.autocast(metric.device.type, enabled=False):
        alike = ranked[:, 1::2] @ ranked[:, 0::2].transpose(1, 2)
    real = valid.gather(1, order)
    alike = alike.masked_fill(~real[:, None, 0::2], -torch.inf).amax(dim=2) if alike.shape[1] else alike.sum(2)
    falling = alike.masked_fill(~real[:, 1::2], -torch.inf).sort(dim=1, descending=True, stable=True).indices
    dropped = torch.zeros_like(valid)
    dropped[:, 1::2] = first_of(falling, count)
    return torch.zeros_like(valid).scatter(1, order, dropped)


@register("zero_tprune")
class ZeroTPrune(TokenReducer):
    """Prune the tokens most like a more important one, then the least important ones.

    Importance: PageRank on each head's attention graph, class token included, heads combined as ``combine_heads`` says.
    A selection: features are not averaged. Acts after the attention residual. The count is fixed.

    Args:
        budget: patches kept; ``Ratio`` rounds down.
        similar: share of the tokens to remove that goes by similarity (cosine of head-mean keys), at most the less
            important half; the rest goes by importance [D].
        iterations: of PageRank's power method; by default 30 in the first third of the network, 5 after it and 1 in the
            last block.
        low: a head whose scores vary less tells nothing apart and is left out; the variance is that of scores scaled to
            mean 1 [D].
        high: a head whose scores vary more sees a single token and is left out; where all heads are, all count [D].
    """

    summary = "prune by PageRank on attention and by similarity"
    source = "Wang et al., CVPR 2024 (arXiv 2305.17328)"
    searchable: ClassVar[Searchable] = {"similar": (0.5, 0.25, 0.75)}

    def __init__(
        self,
        budget: Budget,
        *,
        similar: float = 0.5,
        iterations: int | None = None,
        low: float = 0.01,
        high: float = 0.7,
    ) -> None:
        super().__init__()
        if not low <= high:
            raise ReducerError(f"ZeroTPrune(low={low!r}, high={high!r}): low must not exceed high")
        self.budget = checked_budget(budget, "ZeroTPrune")
        self.similar = checked_share(similar, "ZeroTPrune(similar=…)")
        self.iterations = None if iterations is None else checked_whole(iterations, "ZeroTPrune(iterations=…)", least=1)
        self.low = low
        self.high = high

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "floor")
        if counts.keep_all:
            return None
        rounds = rounds_at(state.block, state.depth) if self.iterations is None else self.iterations
        attention, keys = signals.attention().detach(), signals.keys().detach().mean(dim=1)
        valid = layout.valid_patches
        with torch.no_grad():
            ranks = page_rank(attention, layout.valid, iterations=rounds)
            score = combine_heads(ranks, layout.valid, low=self.low, high=self.high)
            importance = layout.pad_patches(layout.unpad(score), fill=-torch.inf)
            order = importance.sort(dim=1, descending=True, stable=True).indices
            removed = (layout.patches - counts.each).clamp(min=0)
            by_similarity = torch.minimum((removed * self.similar).floor().long(), layout.patches // 2)
            metric = layout.pad_patches(keys.to(score.dtype))
            alike = most_alike(metric, order, valid, by_similarity)
            left = layout.spread(importance.masked_fill(alike, -torch.inf), prefix=0.0)
            kept = keep_highest(layout, left, counts)
        if signals.counting:
            patches, reduces = layout.patches.double(), counts.busy
            signals.spend(reduces * attention.shape[1] * layout.lengths.double() ** 2 * rounds)
            signals.spend(reduces * (patches / 2).ceil() * (patches / 2).floor() * metric.shape[2])
        return None if kept is None else Decision(kept)
