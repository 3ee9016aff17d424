"""STViT: a handful of semantic tokens replace the patches (Chang et al., CVPR 2023).

Two consecutive blocks generate them. The first pools the grid of patches and lets what comes out ask the patches; the
second adds a learned centre to each and lets them ask once more. The patches are then gone. The blocks keep their own
weights: queries come from the semantic tokens, keys and values also from the patches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reducers.budget import Budget, Count, checked_budget
from reducers.checks import checked_choice, checked_flag
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.grid import smaller_grid
from reducers.kit.semantic import check_whole, gather, refine
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import TokenBatch

ClassToken = Literal["query", "pool"]

_SIXTEEN = Count(16)


@register("stvit")
class STViT(TokenReducer):
    """Replace the patches by a few semantic tokens, which two consecutive blocks gather; later blocks see them alone.

    Published: 16 tokens from blocks 4 and 5 of 12, ``at([4, 5], STViT())``, about 58 % fewer multiply-adds. The first
    of its blocks pools and asks the patches that enter it; each further one adds centres of its own (M, D), which are
    all that it learns, and asks them again; blocks between attend among the semantic tokens as usual [D: published are
    two, side by side]. It needs every patch of the image in its place, so other reducers come after it. The LayerScale
    of the authors' new blocks is left out: these blocks are the model's own [D]. No semantic token is one patch's
    continuation; a patch is carried by the one in whose bin it lies. The count is fixed.

    Args:
        budget: semantic tokens; the nearest grid of nearly the same shape as the model's is taken (4 x 4 of 14 x 14),
            for images of any size, and ``Ratio`` rounds to the nearest.
        class_token: what becomes of it, which the publication's code (a Swin's) does not say. ``query`` [D]: it and
            other prefix tokens ask and are asked beside the semantic ones, and the head reads it as ever. ``pool``: it
            goes with the patches, and the head reads the mean of the semantic tokens.
        pooled_keys: the pooled tokens are among the keys of the first layer, as in the authors' code. False, with
            ``class_token="pool"``, is what the published cost was counted with: 0.525, 1.915 and 7.294 G for DeiT-Ti, S
            and B.
        residual: the pooled tokens also remain in the sum; on for pretrained weights [D], off in the released Swin.
    """

    summary = "a handful of semantic tokens asks the patches and replaces them"
    source = "Chang et al., CVPR 2023 (arXiv 2303.08685)"
    traits = Traits(trained=True, site="input", pools=True, needs_token_keys=True)
    scheduled_as = None
    budgets = ("count", "ratio")
    trained_as = "from scratch by the task loss: 300 epochs, AdamW, cosine, 20 epochs of warm-up, clipped at 5"
    keeps_class_token_by = "class_token='query'"

    def __init__(
        self,
        budget: Budget = _SIXTEEN,
        *,
        class_token: ClassToken = "query",
        pooled_keys: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "STViT")
        self.class_token = checked_choice(class_token, ClassToken, "STViT(class_token=…)")
        self.pooled_keys = checked_flag(pooled_keys, "STViT(pooled_keys=…)")
        self.residual = checked_flag(residual, "STViT(residual=…)")
        self.traits = replace(self.traits, may_drop_class_token=class_token == "pool")
        self.centres = nn.ParameterDict()  # by block, (M, D)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """Centres for each block but the first."""
        if self.class_token == "pool" and host.prefix > 1:
            raise ReducerError(
                f"STViT(class_token='pool') drops the class token and the model has {host.prefix} prefix tokens; use "
                "class_token='query', under which they all stay"
            )
        rows, columns = self._shape = self._shape_of(host.grid)
        for block in sorted(blocks)[1:]:
            centre = nn.Parameter(torch.empty(rows * columns, host.width))
            self.centres[str(block)] = nn.init.trunc_normal_(centre, std=0.02)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None

    def block(self, block: Any, batch: TokenBatch, state: State) -> TokenBatch:
        """A layer of the generation: the first pools what enters it, the others refine what it left."""
        patches = state.noted(self)
        return self._refine(block, batch, state, patches[0]) if patches else self._gather(block, batch, state)

    def _shape_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of semantic tokens: those of the model's own grid, for images of any size."""
        patches = grid[0] * grid[1]
        return smaller_grid(grid, self.budget.count(patches, initial=patches, prefix=0, rounding="nearest"))

    def _gather(self, block: Any, batch: TokenBatch, state: State) -> TokenBatch:
        """Layer 1: the pooled patches ask the patches."""
        check_whole(batch, state, self.name)
        state.note(self, batch.layout.pad_patches(batch.x))
        lead = 0 if self.class_token == "pool" else int(batch.layout.lead or 0)
        return gather(block, batch, state, self._shape, lead=lead, pooled_keys=self.pooled_keys, residual=self.residual)

    def _refine(self, block: Any, batch: TokenBatch, state: State, patches: Tensor) -> TokenBatch:
        """Layer 2: the semantic tokens, each shifted by its centre, ask themselves as they were and the patches."""
        layout, centre = batch.layout, self.centres[str(state.block)]
        whole = layout.uniform is not None and layout.uniform[0] - layout.uniform[1] == len(centre)
        if not whole or batch.alive is not None or batch.key_bias is not None:
            raise ReducerError(
                f"stvit refines {len(centre)} semantic tokens at block {state.block}, and another reducer has removed "
                "or masked some; place other reducers after its last block"
            )
        return refine(block, batch, state, patches, centre)
