"""Learned keep or drop: the predictor, the stages and the losses that DynamicViT and dTPS share.

A small network before each stage gives every patch the probability to be kept. Training draws the decision from it
(Gumbel, straight through) and masks what is dropped, so that gradients reach the predictor; inference keeps a fixed
number of the most probable patches and removes the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.budget import Budget, Ratio, checked_budget, rounded_share
from reducers.checks import checked_share, checked_weight
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.selection import first_of, keep_highest, rank_patches
from reducers.maps import Keep, keep_patches
from reducers.reducer import State, TokenReducer, Traits
from reducers.signals import Signals
from reducers.tokens import Counts, Layout

Number = Tensor | int  # of each image (B,), or one number where all images are alike

_EXACT = 10**12  # the largest denominator of a share that thousands of tokens can be multiplied by in 64 bits


def patches_of(layout: Layout, x: Tensor) -> tuple[Layout, Tensor]:
    """The patches without the prefix tokens: their layout, and their packed features (P, D)."""
    if layout.uniform is not None:
        tokens, prefix = layout.uniform
        alone = Layout.alike(layout.images, tokens - prefix, 0, x.device)
        return alone, layout.pad_patches(x).flatten(0, 1)
    counts = layout.patch_counts
    alone = Layout(layout.patches, torch.zeros_like(layout.prefix), sum(counts), None, (counts, [0] * layout.images))
    rows = (~layout.is_prefix).nonzero_static(size=alone.rows).squeeze(1)
    return alone, x.index_select(0, rows)


def mean_over_images(layout: Layout, values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of values (T, C) over each image's tokens, by weight (T,): (B, C); 0 where none counts [D: not 0 / 0]."""
    wide = torch.promote_types(values.dtype, torch.float32)
    each = values.to(wide) if weight is None else values.to(wide) * weight[:, None]
    if layout.uniform is not None:
        summed = each.view(layout.images, layout.uniform[0], each.shape[1]).sum(1)
    else:
        summed = each.new_zeros(layout.images, each.shape[1]).index_add(0, layout.row_image, each)
    number = layout.lengths.to(wide) if weight is None else layout.sum_rows(weight)
    return summed / number.clamp(min=1)[:, None]


class KeepPredictor(nn.Module):
    """DynamicViT's predictor: is a patch worth keeping, given itself and the mean of those still kept?

    LayerNorm, a layer of D features; the first half of them stays the patch's own, the second half is averaged over the
    kept patches of its image; three more layers (D/2, D/4, 2) give two logits, the first of them for keeping.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        self.own = width - half
        self.inward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.outward = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, x: Tensor, layout: Layout, weight: Tensor | None = None) -> Tensor:
        """Log-probabilities (P, 2) to keep and to drop, at least float32, of packed patches (P, D).

        ``weight`` (P,): 1 for patches that are still kept, 0 for those masked before; None where all are kept.
        """
        x = self.inward(x)
        own, shared = x[:, : self.own], x[:, self.own :]
        mean = mean_over_images(layout, shared, weight).to(own.dtype)
        logits = self.outward(torch.cat([own, mean.index_select(0, layout.row_image)], dim=1))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)

    @property
    def macs(self) -> int:
        """Multiply-adds of one patch."""
        return sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))


@dataclass(frozen=True)
class Stage:
    """One stage of one forward pass: what inference keeps there, and in training what was drawn."""

    number: int  # 1, 2, …
    layout: Layout  # the tokens that entered
    first: Number  # patches that entered the first stage
    count: Number  # patches that inference keeps here
    share: Tensor | float  # count of first, before rounding: what the kept share is trained to be
    all_stay: bool  # as many as were left; said only where all images are alike
    alive: Tensor | None = None  # (T,) in training: 1 for prefix tokens and patches not dropped so far, differentiable


def next_stage(budget: Budget, layout: Layout, before: Stage | None, *, initial: int) -> Stage:
    """How many patches the stage after ``before`` keeps.

    ``Ratio(rho)`` of the current tokens keeps floor(N rho^s) at the s-th stage, of the N that entered the first one:
    the published count, which is not rounded from stage to stage. Other budgets count as they always do.
    """
    here: Number = layout.patches if layout.uniform is None else layout.uniform[0] - layout.uniform[1]
    number, first, left = 1, here, here
    if before is not None:  # under a mask the tokens are all there still, so what was to be left is remembered
        number, first, left = before.number + 1, before.first, _fewer(layout, here, before.count)
    share: Tensor | float
    if isinstance(budget, Ratio) and budget.of == "current":
        count = _fewer(layout, _powered(budget, number, first, layout), left)
        share = (budget.value.numerator / budget.value.denominator) ** number
    else:
        count = _counted(budget, left, layout, initial)
        share = count / _one(first)
    all_stay = isinstance(count, int) and isinstance(left, int) and count >= left
    return Stage(number, layout, first, count, share, all_stay)


def _powered(budget: Ratio, number: int, patches: Number, layout: Layout) -> Number:
    """The budget's share to the power of ``number``, of so many patches; in plain integers, which compile."""
    numerator, denominator = budget.value.numerator**number, budget.value.denominator**number
    if denominator > _EXACT:
        near = Fraction(numerator, denominator).limit_denominator(10**6)
        numerator, denominator = near.numerator, near.denominator
    if layout.uniform is not None:
        prefix: Number = layout.uniform[1] if budget.count_prefix else 0
    else:
        patches = Counts.of(layout, patches).each
        prefix = layout.prefix if budget.count_prefix else torch.zeros_like(layout.prefix)
    kept: Number = rounded_share(patches + prefix, numerator, denominator, budget.rounding or "floor") - prefix
    return _one(kept)


def _counted(budget: Budget, patches: Number, layout: Layout, initial: int) -> Number:
    if layout.uniform is not None and isinstance(patches, int):
        return budget.count(patches, initial=initial, prefix=layout.uniform[1], rounding="floor")
    return budget.resolve(Counts.of(layout, patches).each, initial=initial, prefix=layout.prefix, rounding="floor")


def _fewer(layout: Layout, a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return torch.minimum(Counts.of(layout, a).each, Counts.of(layout, b).each)


def _one(number: Number) -> Number:
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)


def ratio_loss(stages: list[Stage]) -> Tensor:
    """Mean over stages and images of (share of the patches not dropped - share to be kept)^2."""
    apart: list[Tensor] = []
    for stage in stages:
        if stage.alive is None:  # a stage that keeps everything draws nothing and is as it should be
            apart.append(torch.zeros((), device=stage.layout.lengths.device))
            continue
        kept = stage.layout.sum_rows(stage.alive * ~stage.layout.is_prefix) / stage.layout.patches.clamp(min=1)
        apart.append((kept - stage.share).square().mean())
    return torch.stack(apart).mean()


def keep_likely(layout: Layout, scores: Tensor, threshold: float) -> Keep | None:
    """Keep the patches of a log-probability (T,) above the threshold's, and the likeliest; None where all stay."""
    order = rank_patches(layout, scores)
    likeliest = first_of(order, layout.patches.clamp(max=1))
    kept = keep_patches(layout, likeliest | (layout.pad_patches(scores.exp()) > threshold))
    return None if kept.new.rows == layout.rows else kept


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(teacher || student) of logits (…, C), one number a row, at least float32."""
    wide = torch.promote_types(ours.dtype, torch.float32)
    student, teacher = ours.to(wide).log_softmax(-1), theirs.to(wide).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


class PredictedKeep(TokenReducer):
    """What DynamicViT and dTPS have in common; they differ in what becomes of the dropped patches."""

    traits = Traits(trained=True, site="input")
    scheduled_as = None  # its stages follow from one another
    budgets = ("ratio", "count")
    schedule: ClassVar[Mapping[str, Any]] = {"reducer_lr_scale": 100.0, "freeze": 0.167}

    def __init__(
        self,
        budget: Budget,
        *,
        threshold: float | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, type(self).__name__)
        self.threshold = None if threshold is None else checked_share(threshold, f"{type(self).__name__}(threshold=…)")
        self.ratio_weight = checked_weight(ratio_weight, f"{type(self).__name__}(ratio_weight=…)")
        self.distill_weight = checked_weight(distill_weight, f"{type(self).__name__}(distill_weight=…)")
        self.predictors = nn.ModuleDict()
        self.traits = replace(self.traits, adaptive=threshold is not None, needs_teacher=self.distill_weight > 0)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """One predictor for each stage."""
        if len(blocks) > 1 and host.regroups:
            raise ReducerError(
                f"the stages of {self.name} follow from one another image by image, and every block of this model "
                "forms windows of its own; place it at one block"
            )
        self.predictors = nn.ModuleDict({str(block): KeepPredictor(host.width) for block in blocks})

    def dropped(self, signals: Signals, kept: Keep) -> Decision:
        """Inference: what becomes of the patches that ``kept`` leaves out."""
        raise NotImplementedError(f"{type(self).__name__} must say what becomes of dropped patches")

    def masked(self, signals: Signals, before: Tensor, keep: Tensor) -> Decision:
        """Training: the same as a mask. before, keep (T,): not dropped so far; not dropped here."""
        raise NotImplementedError(f"{type(self).__name__} must say how dropped patches are masked")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, known = signals.layout, state.noted(self)
        before = known[-1] if known else None
        stage = next_stage(self.budget, layout, before, initial=state.initial)
        if state.training:
            return self._draw(signals, state, stage, before)
        state.note(self, stage)
        if stage.all_stay and self.threshold is None:
            return None
        alone, x = patches_of(layout, signals.output())
        predictor = self._predictor(state)
        if signals.counting:
            asked = Counts.of(layout, stage.count).busy if self.threshold is None else 1.0
            signals.spend(asked * layout.patches * predictor.macs)
        scores = layout.spread(alone.pad(predictor(x, alone)[:, 0]), prefix=0)
        if self.threshold is None:
            kept = keep_highest(layout, scores, Counts.of(layout, stage.count))
        else:
            kept = keep_likely(layout, scores, self.threshold)
        return None if kept is None else self.dropped(signals, kept)

    def _draw(self, signals: Signals, state: State, stage: Stage, before: Stage | None) -> Decision | None:
        """The decision of a training pass: each patch is kept or dropped by chance, all of them stay under a mask."""
        layout = signals.layout
        self._refuse_others(state, layout, before)
        alive = None if before is None else before.alive
        if stage.all_stay:
            state.note(self, replace(stage, alive=alive))
            return None
        alone, x = patches_of(layout, signals.output())
        weight = None if alive is None else patches_of(layout, alive[:, None])[1][:, 0]
        chances = self._predictor(state)(x, alone, weight)
        drawn = F.gumbel_softmax(chances, tau=1.0, hard=True, dim=1)[:, 0]
        keep = layout.spread(alone.pad(drawn), prefix=1)
        alive = torch.ones_like(keep) if alive is None else alive
        state.note(self, replace(stage, alive=alive * keep))
        return self.masked(signals, alive, keep)

    def _refuse_others(self, state: State, layout: Layout, before: Stage | None) -> None:
        """A mask of one's own is all that a training pass may hold."""
        others = (noted for owner, notes in state.notes.items() if owner is not self for noted in notes)
        if any(isinstance(noted, Stage) and noted.alive is not None for noted in others):
            raise ReducerError(
                f"{self.name} is trained with all its stages in one reducer, so that each knows what those before it "
                f"dropped: at([3, 6, 9], {type(self).__name__}(…))"
            )
        if before is not None and before.layout is not layout:
            raise ReducerError(
                f"another reducer removed tokens between two stages of {self.name}, which in training remembers every "
                "token it masked; place the other one before the first stage, or train without it"
            )

    def _predictor(self, state: State) -> KeepPredictor:
        predictor = self.predictors[str(state.block)]
        assert isinstance(predictor, KeepPredictor)
        return predictor

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """``ratio`` holds the drawn shares to the budget's; ``distill`` holds the logits to the dense model's."""
        parts: dict[str, Tensor] = {}
        stages = state.noted(self)
        if self.ratio_weight > 0 and stages:
            parts["ratio"] = self.ratio_weight * ratio_loss(stages)
        if self.distill_weight > 0:
            parts["distill"] = self.distill_weight * divergence(outputs.logits, teacher.logits).mean()
        return parts
