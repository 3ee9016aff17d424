"""DiffRate: how many tokens each block prunes and merges is learned by gradient (Chen et al., ICCV 2023).

Only these counts are learned, the model's weights stay. Where the specification of the method is silent, how gradients
reach the counts is our decision [D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reducers.checks import checked_share, checked_weight, checked_whole
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.ranked_merge import merge_ranked, soft_merge
from reducers.kit.selection import at_most, keep_highest, rank_patches
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.scores import class_attention
from reducers.signals import Signals

_GIGAS = 4.6  # multiply-adds of DeiT-S, on whose scale the cost's loss is weighed [D]
_SLACK = 1e-6  # an expected count above a whole number by less than this is that number


def candidates(patches: int, step: int, like: Tensor) -> Tensor:
    """The counts there are to choose from: all patches, ``step`` fewer, and so on, (C,) float64."""
    return torch.arange(patches, 0, -step, dtype=torch.float64, device=like.device)


def expected_count(logits: Tensor, counts: Tensor) -> Tensor:
    """The mean of the candidate ``counts`` (C,) under softmax(logits), logits (…, C) -> (…), float64."""
    return (logits.double().softmax(-1) * counts).sum(-1)


def kept_probability(logits: Tensor, counts: Tensor, places: int) -> Tensor:
    """The probability that the token of each rank stays: that the count exceeds the rank. (C,) -> (places,) float64"""
    rank = torch.arange(places, device=counts.device)
    return ((counts > rank[:, None]) * logits.double().softmax(-1)).sum(-1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of the one with the gradient of the other."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def learned_counts(expected: Tensor, patches: int) -> Tensor:
    """Tokens that pruning and then merging leave in block after block, (blocks, 2): the expected counts (blocks, 2)
    rounded up, none above the one before it. Gradients pass through the rounding.
    """
    rounded = straight_through((expected.detach() - _SLACK).ceil().clamp(min=1), expected)
    counts, left = [], torch.full_like(rounded[0, 0], patches)
    for wanted in rounded.flatten().unbind():
        left = torch.minimum(left, wanted)
        counts.append(left)
    return torch.stack(counts).view(-1, 2)


@register("diffrate")
class DiffRate(TokenReducer):
    """Prune the least attended patches, merge the next into the most similar of those left; how many is learned.

    Published in every block. Patches are ranked by class attention; the first n_p stay, of them the n_p - n_m last join
    the most similar (cosine of features) of the first n_m: features are averaged, sizes grow by size times similarity
    (not below 0 [D]), later attention is weighted by size. n_p and n_m of each block are the mean of candidate counts
    under a learned distribution, rounded up, and never above the count before. They are the same for all images, and
    hold for the image size that the model was made for. Acts after the attention residual.

    Training: the counts alone, for the task and the square of (cost - target). Both are shares of the dense model's
    multiply-adds, in the published order of work and without the method's own, taken times 4.6: in giga multiply-adds
    as on DeiT-S [D]. Tokens are hidden, not removed; gradients reach a count through the probability that the token of
    each rank is kept. After the last attention, none do but the cost's.

    Args:
        target: share of the dense cost that training aims at; 0.63 is DeiT-S at 2.9 G.
        step: candidate counts are all patches, ``step`` fewer, …
        weight: of the cost's square beside the task.
    """

    summary = "prune and merge by class attention, as many in each block as gradients have found best"
    source = "Chen et al., ICCV 2023 (arXiv 2305.17997)"
    traits = Traits(trained=True, needs_class_token=True)
    schedule: ClassVar[Mapping[str, Any]] = {"lr": 0.01, "weight_decay": 0.0, "freeze": 1.0}
    trained_as = "3 epochs [R] for the counts alone, AdamW lr 0.01, the model's weights as they are; no teacher"

    def __init__(self, *, target: float = 0.63, step: int = 4, weight: float = 5.0) -> None:
        super().__init__()
        self.target = checked_share(target, "DiffRate(target=…)", above=True)
        self.step = checked_whole(step, "DiffRate(step=…)", least=1)
        self.weight = checked_weight(weight, "DiffRate(weight=…)")
        self._blocks: tuple[int, ...] = ()
        self._counts: list[tuple[int, int]] = []
        self._seen: int | None = None  # the version of the logits that the counts were read from

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """Logits (blocks, 2, candidates): of the count that pruning leaves, and of that which merging leaves then."""
        if host.between_units is not None:
            raise ReducerError(
                f"{self.name} learns its counts by a cost that follows from them, and every block of this "
                f"{type(host.base).__name__} {host.between_units}, which costs by the places that are left; use a "
                "method with a budget"
            )
        self._blocks, self._patches, self._prefix = blocks, host.patches, host.prefix
        choices = range(host.patches, 0, -self.step)
        like = host.like
        self.logits = nn.Parameter(torch.zeros(len(blocks), 2, len(choices), device=like.device, dtype=like.dtype))
        mean = math.ceil(sum(choices) / len(choices) - _SLACK)  # what zeros say
        self._counts, self._seen = [(mean, mean)] * len(blocks), _version(self.logits)
        self._shapes = {index: host.block(index).cost for index in range(host.embedded, host.depth)}
        self._outside = _macs_outside(host)

    def kept_counts(self) -> list[tuple[int, int]]:
        """What pruning and then merging leave in each block, read from the logits whenever they have changed."""
        if torch.compiler.is_compiling():  # a graph holds counts as they are
            return self._counts
        version = _version(self.logits)
        if version != self._seen and not self.logits.is_meta:
            with torch.no_grad():
                self._counts = [(int(prune), int(merge)) for prune, merge in self._learned().tolist()]
            self._seen = version
        return self._counts

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self._blocks:
            self.kept_counts()
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._seen = None  # a copy's logits count their changes afresh
        if self._blocks:
            self.kept_counts()

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        if self._blocks:
            self._seen = None  # the tensor itself may be another
            self.kept_counts()

    def _choices(self) -> Tensor:
        return candidates(self._patches, self.step, self.logits)

    def _learned(self) -> Tensor:
        """(blocks, 2) float64, differentiable."""
        return learned_counts(expected_count(self.logits, self._choices()), self._patches)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        index = self._blocks.index(state.block)
        counts = self.kept_counts()
        prune, merge = counts[index]
        if state.training:
            return self._soft(signals, index, merge)
        if merge >= (counts[index - 1][1] if index else self._patches):
            return None  # a block that leaves all images alone costs nothing
        scores, patches = class_attention(signals.class_attention()), layout.width_from(layout.prefix)
        if merge >= patches:
            return None
        prune = min(prune, patches)
        if prune == merge:
            kept = keep_highest(layout, scores, at_most(layout, merge))
            return None if kept is None else Decision(kept)
        merged = merge_ranked(layout, signals.output(), rank_patches(layout, scores), prune=prune, merge=merge)
        if signals.counting:
            leaving = layout.patches.clamp(max=prune) - layout.patches.clamp(max=merge)
            signals.spend(leaving.double() * merge * signals.output().shape[1])
        return Decision(merged, proportional=True)

    def _soft(self, signals: Signals, index: int, merge: int) -> Decision:
        layout = signals.layout
        if layout.uniform is None:
            raise ReducerError(
                "diffrate learns its counts where all images have the same number of tokens: train it without the "
                "adaptive method before it, and place the two together afterwards"
            )
        order = rank_patches(layout, class_attention(signals.class_attention().detach()))
        choices, rank = self._choices(), torch.arange(order.shape[1], device=order.device)
        kept, alone = (
            straight_through(rank < count, kept_probability(self.logits[index, kind], choices, len(rank))).float()
            for kind, count in enumerate(self._counts[index])
        )
        merge = min(merge, len(rank))
        return Decision(soft_merge(layout, signals.output(), order, kept, alone, merge=merge), proportional=True)

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """How far the cost of the learned counts is from the target."""
        learned = self._learned()[:, 1]
        share = self._macs(learned) / self._macs(torch.full_like(learned, self._patches))
        return {"cost": (self.weight * (_GIGAS * (share - self.target)).square()).float()}

    def _macs(self, leaving: Tensor) -> Tensor:
        """Multiply-adds of one image whose reducing blocks leave so many patches each, (blocks,) float64."""
        tokens = torch.full_like(leaving[0], self._prefix + self._patches)
        total = torch.full_like(tokens, self._outside)
        for block, shape in self._shapes.items():
            entering = tokens
            if block in self._blocks:
                tokens = leaving[self._blocks.index(block)] + self._prefix
            total = total + shape.macs(queries=entering, keys=entering, outputs=entering, mlp=tokens)
        return total


def _version(parameter: Tensor) -> int:
    """Counts the changes of a tensor in place; one made for inference alone does not count."""
    return -1 if parameter.is_inference() else parameter._version


def _macs_outside(host: Any) -> float:
    """Multiply-adds of embedding and classifier, of a clip whose frames are units the part of one of them."""
    return float(host.embed_macs(host.blank()) + host.classifier_macs) / host.units
