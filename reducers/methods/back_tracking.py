"""Attention back-tracking with the model's own maps: the oracle form of STTABT (Lee et al., ICLR 2023; methods 9).

Which tokens matter is traced from the output back to the input, through attention maps that are known before the
model runs. STTABT learns a small network to guess those maps; here they are the model's own, from a full pass. So it
costs more than it saves, and says how good a choice of tokens by attention could be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reducers.base import State, TokenReducer
from reducers.budget import Budget, checked_budget
from reducers.checks import checked_flag, checked_share
from reducers.decision import Decision
from reducers.maps import keep_rows
from reducers.methods.topk import first_of
from reducers.registry import register
from reducers.signals import Signals


def back_track(maps: list[Tensor], *, prefix: int, count: int, mixing: float = 0.1) -> list[Tensor]:
    """Masks m_0 … m_L: m_i are the tokens block i must read, m_{i+1} those it must update; each holds the next one.

    maps: head-mean attention of each block, (B, T, T), rows are queries; of the last, those of the prefix will do.
    From m_L, the prefix tokens, backwards: score s = the column mean of the rows in m_{i+1}, each row weighed by
    (mixing w + 1 - mixing) with w its own score, which sum to 1 over m_{i+1} (all 1 at the start); m_i adds the
    ``count`` patches of highest score to m_{i+1}.
    """
    mask = torch.zeros_like(maps[0][:, 0], dtype=torch.bool)
    mask[:, :prefix] = True
    impact = mask.to(maps[0].dtype)
    masks = [mask]
    for attention in reversed(maps):
        weight = (mixing * impact + 1 - mixing) * mask
        score = (weight[:, None, : attention.shape[1]] @ attention).squeeze(1) / mask.sum(1, keepdim=True).clamp(min=1)
        order = score[:, prefix:].sort(dim=1, descending=True, stable=True).indices
        chosen = first_of(order, torch.full_like(order[:, 0], count))
        mask = mask | torch.cat([torch.zeros_like(mask[:, :prefix]), chosen], dim=1)
        impact = score * mask
        impact = impact / impact.sum(1, keepdim=True).clamp(min=torch.finfo(impact.dtype).tiny)
        masks.append(mask)
    return masks[::-1]


@register("back_tracking")
class BackTracking(TokenReducer):
    """Keep the tokens that attention, traced back from the output, says will be read: STTABT with its oracle.

    ``budget`` bounds the patches chosen for each block anew (of those entering block 0); a block's tokens are these
    and all that later blocks need, so the count differs from image to image. At block i the tokens that block i + 1
    must read stay, after serving as keys and values once more; what enters the first block it is placed at is read
    whole [D]. In the last block only prefix tokens are updated, where the head reads no patch. ``Ratio`` rounds up.
    ``count_planning``: book the full pass that the maps come from, so the cost exceeds the dense model's; False leaves
    it out, for the question what the choice is worth. Gradients do not reach the maps.
    """

    summary = "keep what attention, traced back from the output, will read (oracle)"
    source = "Lee et al., ICLR 2023 (STTABT), oracle form"
    adaptive = True
    needs_class_token = True
    uses_positions = True

    def __init__(self, budget: Budget, *, count_planning: bool = True, mixing: float = 0.1) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "BackTracking")
        self.count_planning = checked_flag(count_planning, "BackTracking(count_planning=…)")
        self.mixing = checked_share(mixing, "BackTracking(mixing=…)")

    def plan(self, images: Tensor, host: Any) -> list[Tensor]:
        """The masks of all blocks, (B, N) bool each, patches alone."""
        maps = host.attention_maps(images, book=self.count_planning)
        prefix, patches = host.prefix, maps[0].shape[1] - host.prefix
        count = self.budget.count(patches, initial=patches, prefix=prefix, rounding="ceil")
        masks = back_track(maps, prefix=prefix, count=count, mixing=self.mixing)
        if not host.reads_prefix_alone:
            masks[-1] = masks[-2]
        return [mask[:, prefix:] for mask in masks]

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, pos = signals.layout, signals.positions()
        needed = state.plans[id(self)][state.block + 1]
        stays = needed[layout.row_image, pos.clamp(min=0)] | (pos < 0)  # a token that is no one patch's is not known
        return Decision(keep_rows(layout, stays | layout.is_prefix))
