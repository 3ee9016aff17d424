"""Fixed radial patterns: keep the middle of the image, whatever it shows (Haurum et al., ICCVW 2023)."""

from __future__ import annotations

import functools
import itertools

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice
from reducers.decision import Decision
from reducers.kit.grid import Norm, keep_middle
from reducers.kit.selection import keep_count
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals


@functools.cache
def radii(grid: tuple[int, int], norm: Norm) -> tuple[int, ...]:
    """How far each patch's centre lies from the grid's, row by row: in half patches, for ``l2`` squared."""
    height, width = grid
    found = []
    for row, column in itertools.product(range(height), range(width)):
        down, across = abs(2 * row - height + 1), abs(2 * column - width + 1)
        found.append({"l1": down + across, "l2": down**2 + across**2, "linf": max(down, across)}[norm])
    return tuple(found)


@functools.cache
def ring_counts(grid: tuple[int, int], norm: Norm) -> tuple[int, ...]:
    """How many patches each possible radius holds, the smallest radius first."""
    ordered = sorted(radii(grid, norm))
    return tuple(i + 1 for i in range(len(ordered)) if i + 1 == len(ordered) or ordered[i] != ordered[i + 1])


def nearest_ring(target: int, counts: tuple[int, ...]) -> int:
    """The count nearest to the target, of two equally near ones the smaller."""
    return min(counts, key=lambda offered: abs(offered - target))


@register("fixed_pattern")
class FixedPattern(TokenReducer):
    """Keep the patches within a radius of the image's centre: a control that looks at no image.

    Counts come in rings, so a budget is met only nearly: of 14 x 14 patches 4, 12, 24, … (``l1``), 4, 12, 16, …
    (``l2``) or 4, 16, 36, … (``linf``). Nested; symmetric under rotation by 90 degrees on a square grid. Where another
    reducer has removed some of the patches, as many are kept, from the middle outwards; a token that is no single
    patch's continuation goes first. Acts after the attention residual.

    Args:
        budget: of the radii there are, the one whose number of patches is nearest is taken (the smaller of two);
            ``Ratio`` rounds down before that.
        norm: diamonds (``l1``), circles (``l2``) or squares (``linf``).
    """

    summary = "keep the middle of the image, whatever it shows"
    source = "Haurum et al., ICCVW 2023 (baseline)"
    traits = Traits(control=True, uses_positions=True)

    def __init__(self, budget: Budget, *, norm: Norm = "l2") -> None:
        super().__init__()
        self.budget = checked_budget(budget, "FixedPattern")
        self.norm: Norm = checked_choice(norm, Norm, "FixedPattern(norm=…)")  # type: ignore[assignment]

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, rings = signals.layout, ring_counts(state.grid, self.norm)
        wanted = keep_count(layout, self.budget, state, "floor")
        kept = wanted.map(lambda patches, count: min(nearest_ring(count, rings), patches))
        return keep_middle(signals, radii(state.grid, self.norm), kept)
