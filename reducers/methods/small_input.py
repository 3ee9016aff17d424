"""A smaller input image: the baseline that reduces tokens before there are any (our decision [D])."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget, rounded_share
from reducers.decision import Decision
from reducers.kit.grid import smaller_grid
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals


@register("small_input")
class SmallInput(TokenReducer):
    """Show the model a smaller image: fewer patches of the same size, with interpolated positions.

    Bicubic, antialiased; of a clip every frame alike. A TimeSformer takes positions as its library does, the nearest
    ones, and a model that cannot be shown another size is refused by name. It acts on the whole network wherever it is
    placed; place it once, at block 0. Provenance is told in the patches of the original image: a patch is carried by
    the one that covers its centre.

    Args:
        budget: patches of the smaller image; the nearest grid of nearly the same shape is taken (196, 182, 169, 156,
            144, … of 14 x 14), and ``Ratio`` rounds to the nearest. Of a model with ``dynamic_img_size`` it counts the
            patches of the images that come, whatever their size. Of a clip it is shared evenly among the frames that
            the model decides on together.
    """

    summary = "a smaller input image, positions interpolated"
    source = "baseline"
    traits = Traits(control=True)
    scheduled_as = None
    budgets = ("count", "ratio")

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "SmallInput")

    def prepare(self, images: Tensor, host: Any) -> Tensor:
        """The images (B, C, H, W), or the frames of clips (B, F, C, H, W), at the size of the smaller grid."""
        (height, width), (down, across) = host.whole_patches(images)
        is_clip = images.dim() == 5
        frames = host.grid_of(images)[0] // height if is_clip else 1  # among which the budget is shared
        patches = frames * height * width
        count = self.budget.count(patches, initial=patches, prefix=host.prefix, rounding="nearest")
        rows, columns = smaller_grid((height, width), max(rounded_share(count, 1, frames, "nearest"), 1))
        if (rows, columns) == (height, width):
            return images
        asked = images.shape[:-2]
        images = images.flatten(0, 1) if is_clip else images
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        below, right = height * down - images.shape[-2], width * across - images.shape[-1]
        if below > 0 or right > 0:  # what the model would pad is part of the image it would see
            wide = F.pad(wide, (0, max(right, 0), 0, max(below, 0)))
        size = rows * down, columns * across
        return F.interpolate(wide, size=size, mode="bicubic", antialias=True).to(images.dtype).view(*asked, *size)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None
