"""EVS: efficient video sampling, which keeps the patches that changed most since the frame before (vLLM, Apache-2.0).

In vLLM it prunes what a vision tower made of a video before a language model reads it, so published figures are those
of language models. Here it acts before a block, of a clip's embedded patches by default [D].
"""

from __future__ import annotations

from typing import ClassVar

from reducers.budget import Budget, checked_budget
from reducers.decision import Decision
from reducers.kit.in_time import InTime, cosine
from reducers.kit.selection import keep_highest
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Counts

NEW = 255.0  # of a patch that has none before it: more than any distance of cosines


@register("evs")
class EVS(TokenReducer):
    """Keep the patches of a clip that differ most from the patch in the same place one frame back.

    A patch's score is one minus the cosine of the two; the whole first frame comes before all others. The budget is one
    of the clip, also where a model attends frame by frame [D], so a frame in which nothing changes may be left with its
    class token alone. Place it at block 0, where it sees embedded patches, positions included [D]. Behind another
    reducer a patch is compared with the last one left in its place, and one that has none counts as new [D]. In a model
    with tubelets a frame is a step in time, several frames deep.

    Args:
        budget: patches of the clip kept, but never fewer than a frame has; ``Ratio`` rounds down. Its published share
            of pruning q is ``Ratio(1 - q)``.
    """

    summary = "keep the patches of a clip that changed most since the frame before"
    source = "vLLM (multimodal EVS)"
    traits = Traits(site="input", uses_positions=True, whole_clip=True, inputs=("clips",))
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count", "drop")

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "EVS")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, clips = signals.layout, InTime.of(signals, state)

        def kept(patches: int, prefix: int) -> int:
            count = self.budget.count(patches, initial=state.initial, prefix=prefix, rounding="floor")
            return min(max(count, state.still), patches)

        counts = Counts.by(layout, kept)
        if counts.keep_all:
            return None
        x, before = signals.output(), clips.before
        if signals.counting:
            signals.spend(layout.patches * x.shape[1] * counts.busy)
        change = 1 - cosine(x, x[before.clamp(min=0)])
        token_map = keep_highest(layout, change.masked_fill(before < 0, NEW), counts)
        return None if token_map is None else Decision(token_map)
