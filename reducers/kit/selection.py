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
from reducers.tokens import Counts, Layout


def rank_patches(layout: Layout, scores: Tensor) -> Tensor:
    """Patch indices from highest to lowest score; ties go to the lower index, padding comes last. (T,) -> (B, N)"""
    padded = layout.pad_patches(scores, fill=-torch.inf)
    return padded.sort(dim=1, descending=True, stable=True).indices


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """Mark the first ``count`` (B,) entries of each ``order`` (B, N): (B, N) bool by patch index."""
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    ranks = torch.arange(order.shape[1], device=order.device)
    return chosen.scatter_(1, order, ranks < count[:, None])


def keep_count(layout: Layout, budget: Budget, state: State, rounding: Rounding) -> Counts:
    """How many patches of each image stay by a budget; ``rounding`` where it names none."""
    return Counts.by(
        layout,
        lambda patches, prefix: budget.count(patches, initial=state.initial, prefix=prefix, rounding=rounding),
    )


def at_most(layout: Layout, count: int) -> Counts:
    """So many patches of each image, or all it has."""
    return Counts.by(layout, lambda patches, _: min(patches, count))


def keep_highest(layout: Layout, scores: Tensor, counts: Counts) -> Keep | None:
    """Keep the highest-scoring patches of each image; None where images are alike and that is all of them."""
    if counts.alike is None:
        return keep_patches(layout, first_of(rank_patches(layout, scores), counts.each))
    if counts.keep_all:
        return None
    return keep_ranked(layout, rank_patches(layout, scores), counts.alike)


class Ranked(TokenReducer):
    """What methods have in common that keep the ``budget`` patches of highest score."""

    def __init__(self, budget: Budget, *, score: str = "class_attention", seed: int = 0) -> None:
        super().__init__()
        self.budget = checked_budget(budget, type(self).__name__)
        self.score = score
        self.seed = checked_seed(seed)
        self._score = find_score(score)
        self.traits = replace(
            self.traits,
            control=self._score.uses_random,
            needs_class_token=self._score.needs_class_token,
            uses_random=self._score.uses_random,
        )

    def highest(self, signals: Signals, state: State, rounding: Rounding) -> Keep | None:
        """The selection of the patches that stay; None where all do, which then costs no score."""
        counts = keep_count(signals.layout, self.budget, state, rounding)
        if counts.alike is not None and counts.keep_all:
            return None
        return keep_highest(signals.layout, self._score.compute(signals, state, "concat", self.seed), counts)
