"""Choosing patches: rank them, keep the highest, and how many of each image stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reducers.budget import Budget, Rounding, checked_budget
from reducers.checks import checked_seed
from reducers.maps import Keep, keep_patches, keep_ranked
from reducers.reducer import State, TokenReducer
from reducers.scores import find_score
from reducers.signals import Signals
from reducers.tokens import Layout


def rank_patches(layout: Layout, scores: Tensor) -> Tensor:
    """Patch indices from highest to lowest score; ties go to the lower index, padding comes last. (T,) -> (B, N)"""
    padded = layout.pad_patches(scores, fill=-torch.inf)
    return padded.sort(dim=1, descending=True, stable=True).indices


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """Mark the first ``count`` (B,) entries of each ``order`` (B, N): (B, N) bool by patch index."""
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    ranks = torch.arange(order.shape[1], device=order.device)
    return chosen.scatter_(1, order, ranks < count[:, None])


def keep_count(layout: Layout, budget: Budget, state: State, rounding: Rounding) -> Tensor | int:
    """How many patches each image keeps: one int where all images are alike, else (B,)."""
    if layout.uniform is not None:
        tokens, prefix = layout.uniform
        return budget.count(tokens - prefix, initial=state.initial, prefix=prefix, rounding=rounding)
    return budget.resolve(layout.patches, initial=state.initial, prefix=layout.prefix, rounding=rounding)


def keep_highest(layout: Layout, scores: Tensor, count: Tensor | int) -> Keep | None:
    """Keep the ``count`` highest-scoring patches of each image; None where that is all of them."""
    if isinstance(count, int):
        if count >= layout.uniform[0] - layout.uniform[1]:  # type: ignore[index]  # an int count means uniform
            return None
        return keep_ranked(layout, rank_patches(layout, scores), count)
    return keep_patches(layout, first_of(rank_patches(layout, scores), count))


def keeps_all(layout: Layout, count: Tensor | int) -> bool:
    """No image has more patches than it may keep."""
    if isinstance(count, int):
        assert layout.uniform is not None
        return count >= layout.uniform[0] - layout.uniform[1]
    return bool((count >= layout.patches).all())


def count_each(layout: Layout, count: Tensor | int) -> Tensor:
    """The count of every image, (B,) int64."""
    if isinstance(count, int):
        return torch.full_like(layout.lengths, count)
    return count


def busy(layout: Layout, count: Tensor | int) -> Tensor:
    """(B,) float64: 1 for images that have something to reduce, 0 for those left as they are, which cost nothing."""
    return (count_each(layout, count) < layout.patches).double()


class Ranked(TokenReducer):
    """What methods have in common that keep the ``budget`` patches of highest score."""

    def __init__(self, budget: Budget, *, score: str = "class_attention", seed: int = 0) -> None:
        super().__init__()
        self.budget = checked_budget(budget, type(self).__name__)
        self.score = score
        self.seed = checked_seed(seed)
        self._score = find_score(score)
        self.traits = replace(
            self.traits, needs_class_token=self._score.needs_class_token, uses_random=self._score.uses_random
        )

    def highest(self, signals: Signals, state: State, rounding: Rounding) -> Keep | None:
        """The selection of the patches that stay; None where all do, which then costs no score."""
        count = keep_count(signals.layout, self.budget, state, rounding)
        if isinstance(count, int) and keeps_all(signals.layout, count):
            return None
        return keep_highest(signals.layout, self._score.compute(signals, state, "concat", self.seed), count)
