"""HVT-pool (adapted): HVT's max pooling along the token sequence, on a plain ViT (Pan et al., ICCV 2021; methods 8).

The real HVT has no class token, learns new positions after each pooling, and is trained from scratch. This is its
pooling alone, put into a trained ViT [D]: patches are pooled, prefix tokens stay, no positions are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reducers.base import Decision, State, TokenReducer
from reducers.maps import Mix
from reducers.methods.clusters import Site, checked_choice
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Layout

_WINDOW = 3
_STRIDE = 2


def pooled_length(tokens: int) -> int:
    """Tokens that leave a pooling: 196, 97, 48, 23, 11; fewer than three are left alone."""
    return tokens if tokens < _WINDOW else (tokens - _WINDOW) // _STRIDE + 1


def pool_windows(layout: Layout) -> Mix:
    """The windows as a map. Their first token counts twice, so that it is plain which token lives on in which.

    Overlapping windows make it dense; the last token of an even number is in no window and so is dropped. Each row of
    weights sums to one: a pooled token stands for one, as in HVT's head.
    """
    if layout.uniform is not None:
        tokens, prefix = layout.uniform
        new = Layout.alike(layout.images, prefix + pooled_length(tokens - prefix), prefix, layout.lengths.device)
    else:
        pooled = ((layout.patches - _WINDOW).div(_STRIDE, rounding_mode="floor") + 1).where(
            layout.patches >= _WINDOW, layout.patches
        )
        new = Layout.ragged(layout.prefix + pooled, layout.prefix)
    old_place = torch.arange(layout.longest, device=layout.lengths.device)
    new_place = torch.arange(new.longest, device=layout.lengths.device)
    lead = layout.prefix[:, None, None]
    offset = (old_place - lead) - _STRIDE * (new_place[:, None] - lead)  # (B, M, N) place within the window
    patch = (old_place >= lead) & (new_place[:, None] >= lead)
    pooled_here = (layout.patches >= _WINDOW)[:, None, None]
    window = 0.5 * (offset == 0) + 0.25 * ((offset == 1) | (offset == 2))
    same = (old_place == new_place[:, None]).to(window.dtype)
    weights = torch.where(patch & pooled_here, window, same)
    real = new.valid[:, :, None] & layout.valid[:, None]
    return Mix(layout, new, (weights * real).to(torch.float32))


def max_pool(x: Tensor, pooled: Mix) -> Tensor:
    """The largest value in each window, feature by feature; tokens that are not pooled stay. (T, D) -> (M, D)"""
    old, new = pooled.old, pooled.new
    first = pooled.source  # of a window its first token, else the token itself
    into = new.row_index - new.prefix[new.row_image]
    pools = (into >= 0) & (old.patches >= _WINDOW)[new.row_image]
    most = torch.maximum(x[first + pools.long()], x[first + 2 * pools.long()])
    return torch.maximum(x[first], most)


@register("hvt_pool")
class HVTPool(TokenReducer):
    """Max-pool the patch tokens along the sequence, windows of three, stride two; it takes no budget.

    Each pooling halves: 196, 97, 48, 23, 11. The cost follows from the blocks it is placed at: at 0, at 0 and 6, at 0,
    4 and 8, or at 0, 3, 6 and 9, as in HVT-1 to HVT-4. Windows run in raster order and wrap around the rows, as in
    HVT. Acts after the attention residual, where most methods do; HVT pools after the block, which is before the next
    one: ``site="input"`` there. It cannot be the identity, and works poorly without training.
    """

    summary = "max-pool the token sequence (HVT's pooling on a plain ViT)"
    source = "Pan et al., ICCV 2021 (arXiv 2103.10619), adapted"

    def __init__(self, *, site: Site = "attention") -> None:
        super().__init__()
        self.site = checked_choice(site, Site, "HVTPool(site=…)")  # type: ignore[assignment,misc]  # of this instance

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        if layout.longest - (layout.uniform[1] if layout.uniform else 0) < _WINDOW:
            return None
        pooled = pool_windows(layout)
        return Decision(pooled, max_pool(signals.output(), pooled))
