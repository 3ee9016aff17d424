"""A-ViT with numbers of tokens that cost what is in print.

Its published weights read feature 0 of the tokens; those of another model say nothing there, and no counts of A-ViT
were published, only what they cost: 0.8 of 1.3 G for DeiT-Ti and 3.6 of 4.6 G for DeiT-S. So the depth at which tokens
halt is spread as A-ViT's own prior has it, normally with deviation 1, around a depth of each image, and these around
one for all, with deviation 1 too [ours]; the last is sought so that the mean cost is the printed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reducers import Decision, Placement, at, reduce_tokens
from reducers.methods import AViT
from reducers.reducer import State
from reducers.signals import Signals

PRINTED = {192: 0.8e9, 384: 3.6e9}  # multiply-adds in print, by the width of DeiT
IMAGES = 64  # whose depths are told
_GOLDEN = 0.6180339887498949
_SURE = 20.0  # its sigmoid is 1 but for 2e-9


class ReplayedAViT(AViT):
    """A-ViT that does all its own work, and keeps numbers of tokens given beforehand.

    Scores, sums, weighted outputs, the map and the transfer of the counts to the host are A-ViT's, on every call. Only
    feature 0 of the tokens, from which the score is read, is exchanged: high for those that are to halt, spread evenly
    over the image, low for the others. An image is finished when no patch of it is left.
    """

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.kept = dict(kept)  # block -> (images,) patches that enter it; images beyond the end start again

    def decide(self, signals: Signals, state: State) -> Decision | None:
        rule, x = state.plans[self].rule, signals.output()
        sign = torch.where(self._halts(signals, self.kept[state.block]), _SURE, -_SURE).to(x.dtype)
        x[:, 0] = (sign - rule.beta) / rule.gamma  # in place: a copy of all features would be timed
        return super().decide(signals, state)

    @staticmethod
    def _halts(signals: Signals, kept: Tensor) -> Tensor:
        """(T,) bool: of n patches all but m at even distances, and prefix tokens where m is 0."""
        layout = signals.layout
        patch = ~layout.is_prefix
        wanted = kept.to(patch.device)[torch.arange(layout.images, device=patch.device) % len(kept)]
        wanted = wanted[layout.row_image]
        rank = layout.row_index - layout.prefix[layout.row_image] + 1
        n = layout.patches.clamp(min=1)[layout.row_image]
        m = torch.minimum(wanted, n)
        stays = rank * m // n > (rank - 1) * m // n
        return torch.where(patch, ~stays, wanted == 0)


def kept_at(depth: int, patches: int, middle: float, images: int = IMAGES) -> dict[int, Tensor]:
    """Block -> (images,) patches that enter it, where tokens halt around ``middle`` blocks."""
    normal = torch.distributions.Normal(0.0, 1.0)
    spread = (
        (torch.arange(images, dtype=torch.float64) + 0.5) * _GOLDEN
    ) % 1  # any images in a row are alike in the mean
    own = middle + normal.icdf(spread)  # the depth of each image
    return {block: (patches * (1 - normal.cdf(block - 0.5 - own))).round().long() for block in range(1, depth)}


def cost_of(model: Any) -> Callable[[Mapping[int, Tensor]], float]:
    """What an image costs in the mean, in multiply-adds, where so many patches enter the blocks; A-ViT's own work is
    left out.
    """
    dense = reduce_tokens(model, Placement())
    shapes = [dense.host.block(index).cost for index in range(len(model.blocks))]
    whole, prefix = float(dense.cost(dense.host.blank())[0]), int(model.num_prefix_tokens)

    def cost(block: int, tokens: Tensor) -> float:
        rows = tokens.double()
        return float(shapes[block].macs(queries=rows, keys=rows, outputs=rows, mlp=rows).mean())

    def mean(kept: Mapping[int, Tensor]) -> float:
        all_there = torch.tensor([model.patch_embed.num_patches + prefix])
        saved = (
            cost(block, all_there) - cost(block, torch.where(patches > 0, patches + prefix, 0))
            for block, patches in kept.items()
        )
        return whole - sum(saved)

    return mean


def replayed(model: Any, macs: float, start: int = 0) -> Placement:
    """A-ViT at all blocks but the first, with depths at which it costs ``macs`` multiply-adds; the images from number
    ``start`` on.

    Raises:
        ValueError: no depths give that cost.
    """
    depth, patches, cost = len(model.blocks), model.patch_embed.num_patches, cost_of(model)
    low, high = 0.0, 2.0 * depth
    if not cost(kept_at(depth, patches, low)) <= macs <= cost(kept_at(depth, patches, high)):
        raise ValueError(f"no depths of halting cost {macs / 1e9:.3g} G multiply-adds")
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(kept_at(depth, patches, middle)) > macs else (middle, high)
    kept = kept_at(depth, patches, high)
    return at(range(1, depth), ReplayedAViT({block: each.roll(-start) for block, each in kept.items()}))
