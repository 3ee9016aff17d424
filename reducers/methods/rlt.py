"""RLT: run-length tokenization, which drops the tubelets of a clip that show what the one before showed (arXiv
2411.05222, MIT).

It looks at pixels alone, before anything is computed, and knows how long each tubelet that stays goes on to hold: that
is its size. The authors add an embedding of that length, which must be learned; without it the method needs no
training.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from reducers.checks import checked_choice, checked_flag, checked_number
from reducers.decision import Decision
from reducers.maps import Merge, keep_rows
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import TokenBatch

Reference = Literal["previous", "kept"]


def ends(clips: Tensor, tubelet: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The first and the last frame of every tubelet: clips (B, F, C, H, W) -> twice (B, S, N, C x pixels), in float32
    or wider; S steps in time of N places each, row by row.
    """
    deep, down, across = tubelet
    steps, rows, columns = clips.shape[1] // deep, clips.shape[3] // down, clips.shape[4] // across
    clips = clips[:, : steps * deep, :, : rows * down, : columns * across]
    wide = clips.to(torch.promote_types(clips.dtype, torch.float32))

    def patches(frames: Tensor) -> Tensor:
        cut = frames.unflatten(4, (columns, across)).unflatten(
            3, (rows, down)
        )  # (B, S, C, rows, down, columns, across)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)

    return patches(wide[:, ::deep]), patches(wide[:, deep - 1 :: deep])


def changes(clips: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """How much each tubelet differs from the one before it: clips (B, F, C, H, W) -> (B, S, N), infinite of the first.

    The mean over channels and pixels of |its last frame - the first frame of the one before|.
    """
    first, last = ends(clips, tubelet)
    found = torch.full(first.shape[:3], torch.inf, dtype=first.dtype, device=first.device)
    found[:, 1:] = (last[:, 1:] - first[:, :-1]).abs().mean(3)
    return found


def kept_tubelets(clips: Tensor, tubelet: tuple[int, int, int], tau: float, reference: Reference) -> Tensor:
    """Which tubelets stay: clips (B, F, C, H, W) -> (B, S, N) bool, true of the first of each place."""
    if reference == "previous":
        return changes(clips, tubelet) > tau
    first, last = ends(clips, tubelet)
    held = first[:, 0]
    kept = torch.ones(first.shape[:3], dtype=torch.bool, device=first.device)
    for step in range(1, first.shape[1]):
        kept[:, step] = (last[:, step] - held).abs().mean(2) > tau
        held = torch.where(kept[:, step, :, None], first[:, step], held)
    return kept


@register("rlt")
class RLT(TokenReducer):
    """Drop each tubelet whose pixels are those of the tubelet before it in its place; the first of a clip always stays.

    A tubelet stays where the mean of |its last frame - the first frame of the one before|, over channels and normalised
    pixels, is above the threshold: how many stay is the clip's own affair. In TimeSformer and X-ViT a tubelet is a
    patch of one frame, in ViViT and VideoMAE as deep as the model's. It acts on the clip before any block, wherever it
    is placed; place it once, at block 0. A frame may be left with its class token alone.

    A dropped tubelet is carried by the one it repeats: sizes are run lengths, and those of a place add up to the number
    of steps; the features that stay are their own. A head that reads the mean of patches weighs them by run length, as
    it does all that stands for several [D]. Comparing pixels is not counted, as no norm or sum is. All patches
    are embedded, and counted so, before some are dropped [D].

    Args:
        tau: the threshold, on pixels as the model gets them; below 0 every tubelet stays.
        reference: with what a tubelet is compared. ``previous``: the one before it, dropped or not, as published, so
            that a slow drift is missed; ``kept``: the last one that stayed [D].
        proportional: later attention to a token is weighted by its run length; over space in a divided TimeSformer.
    """

    summary = "drop the tubelets of a clip that repeat the one before"
    source = "Choudhury et al., NeurIPS 2024 (arXiv 2411.05222)"
    traits = Traits(adaptive=True, inputs=("clips",))
    scheduled_as = None

    def __init__(self, tau: float = 0.1, *, reference: Reference = "previous", proportional: bool = False) -> None:
        super().__init__()
        self.tau = checked_number(tau, "RLT(tau=…)")
        self.reference = cast(Reference, checked_choice(reference, Reference, "RLT(reference=…)"))
        self.proportional = checked_flag(proportional, "RLT(proportional=…)")

    def select_patches(self, images: Tensor, host: Any, batch: TokenBatch) -> Decision | None:
        """The runs of each place: clips (B, F, C, H, W)."""
        kept = kept_tubelets(images, host.tubelet, self.tau, self.reference)
        if bool(kept.all()):
            return None
        layout, rows = batch.layout, batch.lattice().view_as(kept)
        chosen = layout.is_prefix.clone()
        chosen[rows[kept]] = True
        keep = keep_rows(layout, chosen)
        step = torch.arange(kept.shape[1], device=kept.device)[:, None]
        begun = step.where(kept, 0).cummax(1).values  # the step in which the run of each tubelet began
        group = keep.destination.index_copy(0, rows.flatten(), keep.destination[rows.gather(1, begun)].flatten())
        runs = Merge(layout, keep.new, group, chosen.float(), drops_none=True)
        return Decision(runs, batch.x.index_select(0, keep.rows), proportional=self.proportional)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None
