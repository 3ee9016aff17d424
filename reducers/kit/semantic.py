"""Semantic tokens: patches pooled on their grid, which then ask the patches; what STViT and STViT-R share.

Blocks keep their own weights: queries come from the semantic tokens, keys and values also from the patches.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.decision import Decision, advance
from reducers.errors import ReducerError
from reducers.hosts.protocol import HostBlock
from reducers.maps import Mix
from reducers.reducer import State
from reducers.runtime.block import run_block
from reducers.runtime.cross import cross_block
from reducers.tokens import Layout, TokenBatch

Shape = tuple[int, int]


def pool_grid(x: Tensor, grid: Shape, shape: Shape) -> Tensor:
    """Adaptive max pooling of patches on their grid, (B, N, D) -> (B, M, D): bins overlap where sides do not divide."""
    pooled = F.adaptive_max_pool2d(x.transpose(1, 2).unflatten(2, grid), shape)
    return pooled.flatten(2).transpose(1, 2)


def bins(grid: Shape, shape: Shape, device: torch.device) -> Tensor:
    """Which patches each pooled token looks at, (M, N) float32; a patch in several bins is shared out evenly, so that
    each column sums to 1.
    """
    sides = []
    for patches, pooled in zip(grid, shape, strict=True):
        place, number = torch.arange(patches, device=device), torch.arange(pooled, device=device)[:, None]
        first = (number * patches).div(pooled, rounding_mode="floor")
        behind = ((number + 1) * patches + pooled - 1).div(pooled, rounding_mode="floor")
        sides.append((place >= first) & (place < behind))
    rows, columns = sides
    inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1).float()
    return inside / inside.sum(dim=0)


def gather(
    block: HostBlock, batch: TokenBatch, state: State, shape: Shape, *, lead: int, pooled_keys: bool, residual: bool
) -> TokenBatch:
    """The first layer of the generation: the pooled patches ask the patches, which are gone from the result.

    ``lead`` prefix tokens of each image ask and are asked beside them; the others go with the patches.
    """
    old, prefix = batch.layout, int(batch.layout.lead or 0)
    tokens = old.pad(batch.x)
    ahead, patches = tokens[:, :lead], tokens[:, prefix:]
    pooled = pool_grid(patches, state.grid, shape)
    asking = torch.cat([ahead, pooled], dim=1)
    asked = torch.cat([asking if pooled_keys else ahead, patches], dim=1)
    kept = asking if residual else torch.cat([ahead, torch.zeros_like(pooled)], dim=1)
    x = cross_block(block, asking, asked, kept, patches=patches.shape[1], of=batch)
    book(block, state, asking, asked)

    new = Layout.alike(old.images, asking.shape[1], lead, x.device)
    weights = bins(state.grid, shape, x.device)
    if lead:
        weights = torch.block_diag(torch.eye(prefix, device=x.device), weights)
    else:
        weights = F.pad(weights, (prefix, 0))
    token_map = Mix(old, new, weights.expand(old.images, -1, -1))
    batch = advance(batch, Decision(token_map, x.flatten(0, 1)))
    return replace(batch, received=None, pos=None if batch.pos is None else torch.full_like(batch.pos, -1))


def refine(block: HostBlock, batch: TokenBatch, state: State, patches: Tensor, centre: Tensor | None) -> TokenBatch:
    """A further layer: the semantic tokens, each shifted by its centre (M, D), ask themselves as they were and the
    patches (B, N, D).
    """
    assert batch.layout.uniform is not None
    tokens = asking = batch.layout.pad(batch.x)
    if centre is not None:
        asking = tokens + F.pad(centre, (0, 0, batch.layout.uniform[1], 0)).to(tokens.dtype)
    asked = torch.cat([tokens, patches], dim=1)
    x = cross_block(block, asking, asked, patches=patches.shape[1], of=batch)
    book(block, state, asking, asked)
    return replace(batch, x=x.flatten(0, 1), received=None)


def recover(block: HostBlock, batch: TokenBatch, state: State, image: TokenBatch) -> TokenBatch:
    """The tokens of the image, as they once were, ask the semantic ones and are all there again.

    Prefix tokens are those that come with the semantic tokens; they ask too, and lead the image. Neither side asks for
    places, as a semantic token has none.
    """
    assert batch.layout.uniform is not None
    prefix, semantic = batch.layout.uniform[1], batch.layout.pad(batch.x)
    asking = torch.cat([semantic[:, :prefix], image.layout.pad(image.x)[:, prefix:]], dim=1)
    x = cross_block(block, asking, semantic, of=image)
    book(block, state, asking, semantic)
    return replace(image, x=x.flatten(0, 1), received=None)


def plain(block: HostBlock, batch: TokenBatch, state: State) -> TokenBatch:
    """The block as it is."""
    if state.tracer is not None:
        rows = batch.layout.lengths
        if (fixed := block.fixed_macs(batch)) is not None:
            state.tracer.cost.both(fixed)
        state.tracer.cost.block(
            block.cost, entering=rows, keys=block.key_counts(batch), queries=rows, leaving=rows
        )  # fmt: skip
    return run_block(block, batch, None, state, None)


def check_whole(batch: TokenBatch, state: State, name: str) -> None:
    """Refuse what is no whole grid of untouched patches."""
    rows, columns = state.grid
    whole = batch.layout.lead is not None and all(patches == rows * columns for patches, _ in batch.layout.kinds)
    if not whole or batch.alive is not None or batch.key_bias is not None:
        raise ReducerError(
            f"{name} pools the grid of {rows} x {columns} patches, and at block {state.block} they are no longer all "
            "there and untouched; place other reducers after it"
        )


def book(block: HostBlock, state: State, asking: Tensor, asked: Tensor) -> None:
    """The cost of a layer: it is the published order of work."""
    if state.tracer is None:
        return
    queries = torch.full((asking.shape[0],), float(asking.shape[1]), dtype=torch.float64, device=asking.device)
    keys = torch.full_like(queries, float(asked.shape[1]))
    state.tracer.cost.both(block.cost.macs(queries=queries, keys=keys, outputs=queries, mlp=queries))
