"""Rotary position embedding by place: the table of a pass, and the row that turns a token. Knows no library.

A token's row is that of the patch it still is (``TokenBatch.pos``), of merged ones the heaviest. Tokens without a place
(class and register tokens, EViT's fused one) are turned by nothing. Under ``places="mean"`` a token that stands for
several is turned as at their mean coordinates, by number of patches, which no row of the table need be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.lazy import cached_property
from reducers.tokens import TokenBatch

At = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Rope:
    """Sines and cosines of one pass, made once for it (in training some libraries jitter coordinates)."""

    table: Tensor  # (N0 + 1, H or 1, 2 d), or (depth, …) where each block has its own; the last row turns by nothing
    half: bool  # features are paired with those half a head away, else with their neighbours
    untouched: Tensor  # (T,) the places as they were when the pass began
    at: At | None = None  # mean coordinates (T, 2) of tokens and a block -> rows (T, H or 1, 2 d); None: heaviest

    @classmethod
    def of(cls, rows: Tensor, batch: TokenBatch, *, half: bool, at: At | None = None) -> Rope:
        """From rows (..., N0, H or 1, 2 d) by place, sines before cosines, for a batch that nothing has reduced."""
        assert batch.pos is not None
        width = rows.shape[-1] // 2
        still = F.pad(rows.new_ones(width), (width, 0)).expand(*rows.shape[:-3], 1, *rows.shape[-2:])
        return cls(torch.cat([rows, still], dim=-3), half, batch.pos, at)

    def of_block(self, block: int) -> Tensor:
        """(N0 + 1, H or 1, 2 d) the table of one block."""
        return self.table if self.table.dim() == 3 else self.table[block]

    def rows(self, batch: TokenBatch, block: int) -> Tensor:
        """(T, H or 1, 2 d) what each token of a batch is turned by in a block."""
        assert batch.pos is not None
        found = self.of_block(block)[batch.pos]  # -1 is the last row
        if self.at is None or batch.centroid is None:
            return found
        summed, members = batch.centroid[:, :2], batch.centroid[:, 2:]
        one_patch = (members == 1) & (batch.pos >= 0)[:, None]  # then the table has the row, to the last bit
        moved = (members > 0) & ~one_patch
        mean = self.at(summed / torch.where(members > 0, members, 1), block).to(found.dtype)
        return torch.where(moved[..., None], mean, found)

    def relocated(self, original: Tensor, patches: int) -> Rope:
        """With places counted in another grid: (N0,) the number there of each place here, of ``patches``."""
        rows = self.table.narrow(-3, self.table.shape[-3] - 1, 1)
        rows = rows.expand(*self.table.shape[:-3], patches + 1, *self.table.shape[-2:]).clone()
        rows.index_copy_(self.table.dim() - 3, original, self.table.narrow(-3, 0, len(original)))
        return replace(self, table=rows)


class Turning:
    """What the ``Core`` of a block adds whose queries and keys are turned by ``TokenBatch.tables``, where there is a
    rope in it.
    """

    batch: TokenBatch
    block: int

    @cached_property
    def _rows(self) -> Tensor:
        rope: Rope = self.batch.tables
        return rope.rows(self.batch, self.block)

    def turn(self, part: Tensor, rows: Tensor | None) -> Tensor:
        rope: Rope | None = self.batch.tables
        if rope is None:
            return part
        return turned(part, self._rows if rows is None else self._rows.index_select(0, rows), half=rope.half)


def turned(part: Tensor, rows: Tensor, *, half: bool) -> Tensor:
    """Queries or keys (T, H, d) turned by rows (T, H or 1, 2 d), in their own dtype."""
    sine, cosine = rows.chunk(2, dim=-1)
    if half:
        first, second = part.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    return (part * cosine + across * sine).to(part.dtype)


def with_centroids(batch: TokenBatch, coordinates: Tensor) -> TokenBatch:
    """A batch that nothing has reduced, its patches at ``coordinates`` (N0, 2): so that means can be taken of them."""
    assert batch.pos is not None
    known = F.pad(F.pad(coordinates.to(batch.size), (0, 1), value=1.0), (0, 0, 0, 1))  # the last row: no place
    return replace(batch, centroid=known[batch.pos])
