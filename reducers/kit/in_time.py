"""Patches of a clip in time: the frame in which each lies, and which one lay in its place before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reducers.reducer import State
from reducers.signals import Signals


@dataclass(frozen=True)
class InTime:
    """Where the tokens of clips lie; ``steps``: grids of patches in time, which are called frames here."""

    image: Tensor  # (T,) the clip of each packed row
    pos: Tensor  # (T,) the patch of its clip, -1 of prefix tokens and of those that lie nowhere
    steps: int
    patches: int  # of a frame

    @classmethod
    def of(cls, signals: Signals, state: State) -> InTime:
        """As a reducer that decides on whole clips finds them."""
        rows, columns = state.grid
        return cls(signals.layout.row_image, signals.positions(), state.steps, rows // state.steps * columns)

    @property
    def frame(self) -> Tensor:
        """(T,) the frame of each token; those that lie nowhere are in one of their own, behind the last."""
        return (self.pos // self.patches).where(self.pos >= 0, self.steps)

    @property
    def before(self) -> Tensor:
        """(T,) the packed row of the token that lies in the same place one frame back, or where that is gone in the
        last frame before in which it is not; -1: there is none.
        """
        nowhere = self.pos < 0
        rows = torch.arange(len(self.pos), device=self.pos.device)
        places = self.image * self.patches + self.pos % self.patches
        place = torch.where(nowhere, (self.image + 1).amax() * self.patches + rows, places) if len(rows) else places
        order = (place * (self.steps + 1) + self.frame).sort(stable=True).indices
        same = place[order[1:]] == place[order[:-1]]
        found = torch.full_like(rows, -1)
        found[order[1:]] = order[:-1].where(same, -1)
        return found


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Row by row (T, D), (T, D) -> (T,), in float32 or wider; of equal rows exactly 1, of a row of zeros 0."""
    wide = torch.promote_types(one.dtype, torch.float32)
    one, other = one.to(wide), other.to(wide)
    squared = (one * one).sum(1) * (other * other).sum(1)  # under one root, equal rows tie whatever their length
    return (one * other).sum(1) / squared.sqrt().clamp(min=torch.finfo(wide).tiny)
