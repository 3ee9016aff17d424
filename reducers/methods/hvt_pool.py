"""HVT's max pooling along the token sequence, on a plain ViT (Pan et al., ICCV 2021).

HVT itself has no class token, learns new positions after each pooling, and is trained from scratch. Put into a trained
ViT, its pooling alone is "HVT-pool (adapted)" [D]: patches are pooled, prefix tokens stay, no positions are added.
On an average-pooled model without a class token, with learned positions and trained from scratch, it is HVT.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.checks import checked_choice, checked_flag
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.clustering import Site
from reducers.maps import Mix
from reducers.reducer import Searchable, State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Counts, Layout

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
    new = layout.leaving(Counts.by(layout, lambda patches, _: pooled_length(patches)))
    old_place = torch.arange(layout.longest, device=layout.lengths.device)
    new_place = torch.arange(new.longest, device=layout.lengths.device)
    prefix = layout.prefix[:, None, None]
    offset = (old_place - prefix) - _STRIDE * (new_place[:, None] - prefix)  # (B, M, N) place within the window
    patch = (old_place >= prefix) & (new_place[:, None] >= prefix)
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
    4 and 8, or at 0, 3, 6 and 9, as in HVT-1 to HVT-4. Windows run in raster order and wrap around the rows, as in HVT.
    It cannot be the identity, and works poorly without training.

    HVT-4 is ``at([1, 4, 7, 10], HVTPool(site="input", positions=True))`` on a model with
    ``class_token=False, global_pool="avg"``, trained from scratch.

    Args:
        site: ``attention``: after the attention residual, where most methods act; HVT pools after the block, which is
            before the next one: ``input`` there.
        positions: a learned table is added after each pooling, one vector for each place (normal, 0.02, no weight
            decay), as in HVT; then it must be trained, and one reducer serves all its blocks, with nothing before it
            that removes patches.
    """

    summary = "max-pool the token sequence (HVT's pooling on a plain ViT)"
    source = "Pan et al., ICCV 2021 (arXiv 2103.10619), adapted"
    traits = Traits(pools=True)
    trained_as = "HVT: 300 epochs from scratch by DeiT's recipe, lr 5e-4 per 512 images, weight decay 0.025, no teacher"
    searchable: ClassVar[Searchable] = {"site": ("attention", "input")}

    def __init__(self, *, site: Site = "attention", positions: bool = False) -> None:
        super().__init__()
        self.site = checked_choice(site, Site, "HVTPool(site=…)")  # type: ignore[assignment]
        self.positions = checked_flag(positions, "HVTPool(positions=…)")
        self.traits = replace(self.traits, trained=self.positions)
        self.tables = nn.ParameterDict()  # by block: (patches left, D)

    def join(self, host: Any, blocks: tuple[int, ...]) -> None:
        if self.positions:  # else it has no parameters, and any model will do
            super().join(host, blocks)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """A table for each block that pools."""
        left = host.patches
        for block in blocks:
            if left < _WINDOW:
                break
            left = pooled_length(left)
            self.tables[str(block)] = nn.init.trunc_normal_(nn.Parameter(torch.empty(left, host.width)), std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The parameters that are not decayed, as timm's models name theirs."""
        return {f"tables.{block}" for block in self.tables}

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        if layout.width_from(layout.prefix) < _WINDOW:
            return None
        pooled = pool_windows(layout)
        features = max_pool(signals.output(), pooled)
        if self.positions:
            features = self._placed(features, pooled.new, state.block)
        return Decision(pooled, features)

    def _placed(self, features: Tensor, layout: Layout, block: int) -> Tensor:
        """The pooled patches with the block's learned positions."""
        table = self.tables.get(str(block))
        if table is None or layout.uniform is None or layout.uniform[0] - layout.uniform[1] != len(table):
            raise ReducerError(
                f"hvt_pool(positions=True) has no positions for the patches that arrive at block {block}: place one "
                "reducer at all its blocks, let no other remove patches before it, and keep the model's image size"
            )
        return layout.unpad(layout.pad(features) + F.pad(table, (0, 0, layout.uniform[1], 0)))
