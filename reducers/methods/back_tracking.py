"""Attention back-tracking with the model's own maps: the oracle form of STTABT (Lee et al., ICLR 2023).

Which tokens matter is traced from the output back to the input, through attention maps that are known before the
model runs. STTABT learns a small network to guess those maps; here they are the model's own, from a full pass. So it
costs more than it saves, and says how good a choice of tokens by attention could be.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_flag, checked_share
from reducers.decision import Decision
from reducers.kit.back_tracking import back_track
from reducers.maps import keep_rows
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals


@register("back_tracking")
class BackTracking(TokenReducer):
    """Keep the tokens that attention, traced back from the output, says will be read: STTABT with its oracle.

    A block's tokens are those chosen for it and all that later blocks need, so the count differs from image to image.
    At block i the tokens that block i + 1 must read stay, after serving as keys and values once more; what enters the
    first block it is placed at is read whole [D]. In the last block only prefix tokens are updated, where the head
    reads no patch. Gradients do not reach the maps.

    Args:
        budget: bounds the patches chosen for each block anew, of those entering block 0; ``Ratio`` rounds up.
        count_planning: book the full pass that the maps come from, so that the cost exceeds the dense model's; False
            leaves it out, for the question what the choice is worth.
        mixing: how far a token that reads is weighed by its own importance: 0 not at all, 1 by it alone.
    """

    summary = "keep what attention, traced back from the output, will read (oracle)"
    source = "Lee et al., ICLR 2023 (STTABT), oracle form"
    traits = Traits(control=True, adaptive=True, needs_class_token=True, uses_positions=True, needs_token_keys=True)
    scheduled_as = None
    budgets = ("count", "ratio")

    def __init__(self, budget: Budget, *, count_planning: bool = True, mixing: float = 0.1) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "BackTracking")
        self.count_planning = checked_flag(count_planning, "BackTracking(count_planning=…)")
        self.traits = replace(self.traits, oracle=not count_planning)
        self.mixing = checked_share(mixing, "BackTracking(mixing=…)")

    def plan(self, images: Tensor, host: Any) -> list[Tensor]:
        """The masks of all blocks, (B, N) bool each, patches alone."""
        maps = host.attention_maps(images, book=self.count_planning)
        prefix, patches = host.prefix, maps[0].shape[1] - host.prefix
        count = self.budget.count(patches, initial=patches, prefix=prefix, rounding="ceil")
        masks = back_track(maps, prefix=prefix, count=count, mixing=self.mixing)
        if not host.reads_prefix_alone:
            masks[-1] = masks[-2]
        # blocks within the embedding read all that the first one behind them does
        return [mask[:, prefix:] for mask in [masks[0]] * host.embedded + masks]

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, pos = signals.layout, signals.positions()
        needed = state.plans[self][state.block + 1]
        stays = needed[layout.row_image, pos.clamp(min=0)] | (pos < 0)  # a token that is no one patch's is not known
        return Decision(keep_rows(layout, stays | layout.is_prefix))
