"""What is told by the places of patches on their grid: patterns around the middle, and smaller grids."""

from __future__ import annotations

from typing import Literal

import torch

from reducers.decision import Decision
from reducers.kit.selection import keep_highest
from reducers.signals import Signals
from reducers.tokens import Counts

Norm = Literal["l1", "l2", "linf"]


def keep_middle(signals: Signals, far: tuple[float, ...], counts: Counts) -> Decision | None:
    """Keep the ``counts`` tokens of each image that lie nearest to its centre; None where that is all of them.

    ``far``: the distance of every original patch. A token that is no single patch's continuation goes first.
    """
    if counts.keep_all:
        return None
    pos = signals.positions()
    table = torch.tensor(far, dtype=torch.float32, device=pos.device)
    middle = (-table[pos.clamp(min=0)]).masked_fill(pos < 0, torch.finfo(torch.float32).min)
    kept = keep_highest(signals.layout, middle, counts)
    return None if kept is None else Decision(kept)


def smaller_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of about ``count`` patches, of nearly the same shape.

    Sides are rounded to whole patches each by itself, so that 13 x 14 lies between 13 x 13 and 14 x 14; of two grids
    equally near to the count the smaller one.
    """
    height, width = grid
    shapes = [
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in range(1, width + 1)
        if abs(rows * width - columns * height) <= max(height, width)
    ]
    return min(shapes, key=lambda shape: (abs(shape[0] * shape[1] - count), shape[0] * shape[1], shape[0]))
