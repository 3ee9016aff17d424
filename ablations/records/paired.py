"""Two results on the same images: the one test by which this project tells them apart. Standard library alone.

McNemar's test over the images on which they disagree, Bonett and Price's interval of the difference, and Holm's
correction over all tests of a question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ablations.records.wilson import Z95

ALPHA = 0.05
"""Told apart: a p-value, corrected over its question, below this."""


def mcnemar(first_only: int, second_only: int) -> tuple[float, float]:
    """(p, mid-p), two-sided, from how many images only one of the two gets right.

    p is of the exact (binomial) test; mid-p (Fagerland, Lydersen and Laake, 2013) is less conservative. Both are exact
    until the last division, whatever the numbers.
    """
    tail, ways = _tails(first_only + second_only, min(first_only, second_only))
    draws = 1 << first_only + second_only
    return min(1.0, 2 * (tail + ways) / draws), min(1.0, (2 * tail + ways) / draws)


def mcnemar_greater(first_only: int, second_only: int) -> float:
    """The exact test one-sided: how often fair coins would give the first as many of the disagreements, or more."""
    tail, ways = _tails(first_only + second_only, second_only)
    return (tail + ways) / (1 << first_only + second_only)


def _tails(count: int, heads: int) -> tuple[int, int]:
    """Of the draws of ``count`` fair coins: those with fewer heads than so many, and those with just so many."""
    tail, ways = 0, 1
    for fewer in range(heads):
        tail += ways
        ways = ways * (count - fewer) // (fewer + 1)
    return tail, ways


def bonett_price(first_only: int, second_only: int, images: int, *, z: float = Z95) -> tuple[float, float]:
    """The adjusted Wald interval of a difference of paired proportions (Bonett and Price, 2012), which holds its level
    for few disagreements, where the plain one has width 0. ``z``: as for ``wilson``.
    """
    first, second = (first_only + 1) / (images + 2), (second_only + 1) / (images + 2)
    half = z * math.sqrt((first + second - (first - second) ** 2) / (images + 2))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values adjusted for having looked at all of them."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
