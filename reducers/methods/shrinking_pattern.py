"""Shrinking radial patterns: a radius for every block, the smaller the deeper (Haurum et al., ICCVW 2023).

The contiguous variant of the fixed patterns: no budget, the cost follows from the blocks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

from reducers.checks import checked_choice, checked_whole
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.grid import Norm, keep_middle
from reducers.kit.selection import at_most
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals

SMALLEST = 1.0
_SLACK = 1e-9  # a patch on the radius is within it, whatever the last digit says


@functools.cache
def distances(grid: tuple[int, int], norm: Norm) -> tuple[float, ...]:
    """How far each patch lies from the centre in the published coordinates, row by row.

    An axis of n patches runs from -n/2 to n/2 inclusive: -7 … 7 for 14.
    """

    def axis(patches: int) -> list[float]:
        return [patches / 2 * abs(2 * place - patches + 1) / max(patches - 1, 1) for place in range(patches)]

    length: dict[str, Callable[[float, float], float]] = {"l1": lambda y, x: y + x, "l2": math.hypot, "linf": max}
    return tuple(length[norm](y, x) for y, x in itertools.product(axis(grid[0]), axis(grid[1])))


def radius_at(block: int, start: int, end: int, grid: tuple[int, int], norm: Norm) -> float:
    """Of ``end - start + 3`` radii at equal steps from the corner's down to 1.0, without the two ends, the block's."""
    corner = max(distances(grid, norm))
    return corner + (SMALLEST - corner) * (block - start + 1) / (end - start + 2)


@functools.cache
def counts_within(grid: tuple[int, int], norm: Norm, radius: float) -> int:
    """How many patches lie within the radius; the innermost ones in any case [D]."""
    found = distances(grid, norm)
    return sum(far <= max(radius, min(found)) + _SLACK for far in found)


@register("shrinking_pattern")
class ShrinkingPattern(TokenReducer):
    """Keep the patches within a radius that shrinks from block to block: a control that looks at no image.

    Each block has its own radius, in equal steps from the corner's to 1.0, both ends left out; a patch on the radius
    stays. It takes no budget, the cost follows from the blocks, and a block between ``start`` and ``end`` in which it
    is not placed is passed over. Where another reducer has removed patches, as many are kept, from the middle outwards
    [D]. Nested; symmetric under rotation by 90 degrees on a square grid. Acts after the attention residual. The count
    is fixed. Never the identity.

    Args:
        norm: diamonds (``l1``), circles (``l2``) or squares (``linf``).
        start: first block of the steps.
        end: last block of the steps; the model's last where none is named.
    """

    summary = "keep the middle of the image within a radius that shrinks from block to block"
    source = "Haurum et al., ICCVW 2023 (baseline, contiguous)"
    traits = Traits(control=True, uses_positions=True)

    def __init__(self, *, norm: Norm = "l2", start: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.norm: Norm = checked_choice(norm, Norm, "ShrinkingPattern(norm=…)")  # type: ignore[assignment]
        self.start = checked_whole(start, "ShrinkingPattern(start=…)", least=0)
        self.end = None if end is None else checked_whole(end, "ShrinkingPattern(end=…)", least=self.start)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        end = state.depth - 1 if self.end is None else self.end
        if not self.start <= state.block <= end:
            raise ReducerError(
                f"shrinking_pattern has radii for blocks {self.start} to {end} and was placed at block {state.block}; "
                "place it between them, or widen start and end"
            )
        radius = radius_at(state.block, self.start, end, state.grid, self.norm)
        within = counts_within(state.grid, self.norm, radius)
        return keep_middle(signals, distances(state.grid, self.norm), at_most(signals.layout, within))
