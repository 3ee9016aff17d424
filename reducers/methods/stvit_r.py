"""STViT-R on a plain ViT: semantic tokens for four blocks out of six, and then the image's again (Chang et al., 2023).

Published on Swin (``reducers.backbones.stvit_r``), whose third stage is made of units of six blocks. Here a unit is six
blocks of the model with their own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reducers.budget import Budget, Count, checked_budget
from reducers.checks import checked_flag
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.grid import smaller_grid
from reducers.kit.semantic import check_whole, gather, plain, recover, refine
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import TokenBatch

UNIT = 6
_THIRTY_SIX = Count(36)


def first_blocks(blocks: Sequence[int]) -> tuple[int, ...]:
    """The first block of each unit of six blocks in a row.

    Raises:
        ReducerError: the blocks are no whole units.
    """
    ordered = sorted(blocks)
    units = [ordered[start : start + UNIT] for start in range(0, len(ordered), UNIT)]
    if any(unit != list(range(unit[0], unit[0] + UNIT)) for unit in units):
        raise ReducerError(
            f"stvit_r acts in units of {UNIT} blocks in a row, and stands at blocks {ordered}; place it at the last "
            "six, at(range(6, 12), STViTR(…)), or at several such units"
        )
    return tuple(unit[0] for unit in units)


@register("stvit_r")
class STViTR(TokenReducer):
    """Work on a few semantic tokens for four blocks out of six, then let every patch of the image ask them.

    A unit is six blocks in a row, b … b + 5, with their own weights: block b is plain; b + 1 and b + 2 generate
    semantic tokens as ``stvit`` does; b + 3 and b + 4 work on those alone; in b + 5 the patches, as they left b, ask
    the semantic tokens. So a unit takes a whole map and gives a whole map back, at lower cost, for dense tasks and for
    another unit: ``at(range(6, 12), STViTR(Count(9)))``, ``at(range(12), …)`` for two. Class and other prefix tokens
    work with the semantic ones, ask with the patches in the last block, and lead them again [D]. The whole is ours for
    plain ViTs [D]: published is Swin's third stage, where the tokens of a window ask a part of the map first.

    It needs every patch of the image in its place. Inside a unit a patch is carried by the semantic token in whose bin
    it lies; after it by itself. The LayerScale of the authors' new blocks is left out [D]. The count is fixed.

    Args:
        budget: semantic tokens; the nearest grid of nearly the same shape as the model's is taken (6 x 6 of 14 x 14:
            as many as the released Swin has), for images of any size, and ``Ratio`` rounds to the nearest.
        centres: the second generation adds a learned vector to each semantic token (M, D), one set a unit, all that the
            method learns of its own. On here [D]: the authors say that it helps much on DeiT; off in the released Swin.
        pooled_keys: the pooled tokens are among the keys of the first generation, as released.
        residual: the pooled tokens also remain in the sum; on for pretrained weights [D], off in the released Swin.
    """

    summary = "semantic tokens for four blocks out of six, from which all patches are recovered"
    source = "Chang et al., CVPR 2023 (arXiv 2303.08685); on a plain ViT ours"
    traits = Traits(trained=True, site="input", pools=True, needs_token_keys=True)
    scheduled_as = None
    budgets = ("count", "ratio")
    unit: ClassVar[int] = UNIT
    trained_as = (
        "STViT-R-Swin from scratch by the task loss: 300 epochs, AdamW, 5e-4 for 512 images, cosine, 20 epochs of "
        "warm-up, weight decay 0.05, clipped at 5, stochastic depth 0.3 (S)"
    )

    def __init__(
        self,
        budget: Budget = _THIRTY_SIX,
        *,
        centres: bool = True,
        pooled_keys: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "STViTR")
        self.centres = checked_flag(centres, "STViTR(centres=…)")
        self.pooled_keys = checked_flag(pooled_keys, "STViTR(pooled_keys=…)")
        self.residual = checked_flag(residual, "STViTR(residual=…)")
        self.units = nn.ParameterDict()  # centres by the first block of the unit, (M, D)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """Find the units, and make centres for each."""
        self._first = first_blocks(blocks)
        rows, columns = self._shape = self._shape_of(host.grid)
        for first in self._first if self.centres else ():
            centre = nn.Parameter(torch.empty(rows * columns, host.width))
            self.units[str(first)] = nn.init.trunc_normal_(centre, std=0.02)

    def _shape_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of semantic tokens: those of the model's own grid, for images of any size."""
        patches = grid[0] * grid[1]
        return smaller_grid(grid, self.budget.count(patches, initial=patches, prefix=0, rounding="nearest"))

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None

    def block(self, block: Any, batch: TokenBatch, state: State) -> TokenBatch:
        """One of the six blocks of a unit."""
        first = max(each for each in self._first if each <= state.block)
        inside = state.block - first
        if inside == 0:
            check_whole(batch, state, self.name)
            batch = plain(block, batch, state)
            state.note(self, batch)
            return batch
        if inside in (3, 4):
            return plain(block, batch, state)
        image: TokenBatch = state.noted(self)[-1]
        if inside == 1:
            lead = int(batch.layout.lead or 0)
            return gather(
                block, batch, state, self._shape, lead=lead, pooled_keys=self.pooled_keys, residual=self.residual
            )
        if inside == 2:
            return refine(block, batch, state, image.layout.pad_patches(image.x), self._centre(first))
        return recover(block, batch, state, image)

    def _centre(self, first: int) -> Tensor | None:
        return self.units[str(first)] if self.centres else None
