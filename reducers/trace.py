"""The trace: what happened to every image's tokens on the way, and what it cost; of clips, to every clip's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from reducers.cost import CostMeter
from reducers.tokens import TokenBatch


@dataclass(frozen=True)
class Trace:
    """What a traced forward pass tells.

    Blocks have the model's own numbers. Those that are a part of its embedding (``Host.embedded``) are told with the
    tokens that enter the first one behind them, whatever grid they work on themselves: nothing is reduced there.
    """

    tokens: Tensor  # (B, depth + 1) int64: entering block 0, 1, …, and leaving the last one, prefix included
    macs: Tensor  # (B,) float64: multiply-adds as executed, the reducers' own work included
    reducer_macs: Tensor  # (B,) float64: the reducers' part of it
    reference_macs: Tensor  # (B,) float64: the published order of work, without the reducers' own
    _owner: list[Tensor]
    _kept: list[Tensor]
    _class_kept: list[Tensor]
    lies: Tensor | None = None  # (B, N0) int64: the patch in which each original token lies; None: that of its number

    def owner(self, block: int) -> Tensor:
        """(B, N0) int64: which token (its place in its image, prefix included) leaving the block carries each
        original patch; -1 = dropped.

        Under a dense map it is the token with the patch's largest weight.
        """
        return self._owner[block]

    def kept(self, block: int) -> Tensor:
        """(B, N0) bool:
        the patch still has a row of its own after the block (of a merged group its heaviest member).
        """
        return self._kept[block]

    def covered(self, block: int) -> Tensor:
        """(B, N0) bool: a token that ``kept`` tells of lies in the patch. The same as ``kept``, but for models that
        sample their tokens where they like (PS-ViT): several may lie in one patch, and none in another.
        """
        kept = self.kept(block)
        if self.lies is None:
            return kept
        return torch.zeros_like(kept, dtype=torch.int64).scatter_add_(1, self.lies, kept.long()) > 0

    def class_kept(self, block: int) -> Tensor:
        """(B,) bool: the class token (of a clip, that of each frame) is still there after the block; False for a model
        without one.
        """
        return self._class_kept[block]


def _of_samples(batch: TokenBatch, values: Tensor) -> Tensor:
    """Of each unit (U,) -> of each sample (B,)."""
    return values if batch.units is None else batch.units.sum(values)


def _tokens(batch: TokenBatch) -> Tensor:
    """(B,) tokens of each sample."""
    return batch.layout.lengths if batch.units is None else batch.units.tokens(batch.layout.lengths)


class Tracer:
    """Collects a trace while the blocks run; without ``detail`` the cost alone."""

    cost: CostMeter

    def __init__(self, *, detail: bool = True) -> None:
        self.detail = detail
        self._tokens: list[Tensor] = []
        self._owner: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._class_kept: list[Tensor] = []
        self._place: Tensor | None = None  # (N0,) the patch of the stage that has each of the first one's in it
        self._lies: Tensor | None = None

    def start(self, batch: TokenBatch) -> None:
        """Before the first block that runs, with nothing reduced yet; where details are asked for,
        the batch has places and provenance.
        """
        self.cost = CostMeter(batch.samples, batch.x.device)
        self._tokens.append(_tokens(batch))
        self._lies = batch.lies

    def enter(self, parents: Tensor | None) -> None:
        """A later stage begins, with the patches told by ``Host.parents``; original patches stay the first stage's."""
        if parents is not None:
            self._place = parents if self._place is None else parents[self._place]

    def after_block(self, batch: TokenBatch) -> None:
        """A block is done."""
        if not self.detail:
            return
        layout, origin = batch.layout, batch.origin
        assert batch.pos is not None and origin is not None
        self._tokens.append(_tokens(batch))
        self._owner.append(self._of_the_first((origin - batch.starts[:, None]).masked_fill(origin < 0, -1)))
        kept = torch.zeros(batch.samples, origin.shape[1], dtype=torch.bool, device=batch.x.device)
        own = (batch.pos >= 0).nonzero().squeeze(1)
        sample, place = layout.row_image[own], batch.pos[own]
        if batch.units is not None:
            sample, place = batch.units.sample[sample], batch.units.places[batch.units.number[sample], place]
        kept[sample, place] = True
        self._kept.append(self._of_the_first(kept))
        self._class_kept.append(_of_samples(batch, (batch.cls < 0).long()) == 0)

    def _of_the_first(self, patches: Tensor) -> Tensor:
        """What is told of this stage's patches, told of those of the first."""
        return patches if self._place is None else patches[:, self._place]

    def twin(self) -> Tracer:
        """One that stands where this one does and goes on by itself, as for a block that will run again."""
        twin = copy.copy(self)
        twin.cost = copy.copy(self.cost)
        twin._tokens, twin._owner = list(self._tokens), list(self._owner)
        twin._kept, twin._class_kept = list(self._kept), list(self._class_kept)
        return twin

    def finish(self) -> Trace:
        cost = self.cost
        return Trace(
            torch.stack(self._tokens, dim=1), cost.executed, cost.reducer, cost.reference,
            self._owner, self._kept, self._class_kept, self._lies,
        )  # fmt: skip
