"""Fewer frames: the baseline that shortens a clip before there are any tokens (our decision [D])."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor

from reducers.budget import Budget, checked_budget, rounded_share
from reducers.decision import Decision
from reducers.frames import spread_steps
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals


@register("fewer_frames")
class FewerFrames(TokenReducer):
    """Show the model fewer frames of a clip, at even distances, the first one among them.

    In a model with tubelets whole steps in time stay or go, each as deep as a tubelet. A frame that stays has the time
    embedding of its own time, which is what a TimeSformer of transformers gives it; in an X-ViT each group of frames
    keeps as many. It acts on the whole network wherever it is placed; place it once, at block 0. Provenance is told in
    the patches of the clip as it was given: a frame that is left out is carried by the one before it that stays.

    Args:
        budget: patches kept, as those of other methods are counted in the model (of the clip, or of a frame, on
            average); the nearest number of frames is taken, halves upwards.
    """

    summary = "fewer frames of the clip"
    source = "baseline"
    traits = Traits(control=True, inputs=("clips",))
    scheduled_as = None
    budgets = ("ratio", "count")

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "FewerFrames")

    def prepare(self, images: Tensor, host: Any) -> Tensor:
        """The clips (B, F, C, H, W) with fewer frames."""
        steps, multiple = host.whole_steps(images)
        rows, columns = host.grid_of(images)
        patches = rows * columns
        count = self.budget.count(patches, initial=patches, prefix=host.prefix, rounding="nearest")
        share = Fraction(count * steps, patches * multiple)
        kept = max(rounded_share(1, share.numerator, share.denominator, "nearest"), 1) * multiple
        if kept >= steps:
            return images
        by_step = images[:, : images.shape[1] // steps * steps].unflatten(1, (steps, images.shape[1] // steps))
        return by_step[:, spread_steps(steps, kept)].flatten(1, 2)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None
