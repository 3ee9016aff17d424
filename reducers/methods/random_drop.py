"""Random drop: the baseline that keeps the field honest (our decision [D])."""

from __future__ import annotations

from reducers.budget import Budget
from reducers.decision import Decision
from reducers.kit.selection import Ranked
from reducers.reducer import State, Traits
from reducers.registry import register
from reducers.signals import Signals


@register("random")
class RandomDrop(Ranked):
    """Keep a uniformly random subset of the patch tokens, nested across blocks.

    The subset belongs to (seed, image): the same alone and in any batch.

    Args:
        budget: patches kept; ``Ratio`` rounds down.
        seed: of the draw.
    """

    summary = "keep a random subset of the patch tokens"
    source = "baseline"
    traits = Traits(control=True)

    def __init__(self, budget: Budget, *, seed: int = 0) -> None:
        super().__init__(budget, score="random", seed=seed)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        kept = self.highest(signals, state, "floor")
        return None if kept is None else Decision(kept)
