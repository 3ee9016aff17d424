"""Student's interval of a mean, as rows record it. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

_MANY = 200  # degrees of freedom from which on Fisher's expansion is exact to eleven digits
_HALVINGS = 80  # of a bracket, down to the last bit
_LEVEL = 0.95


def mean_interval(values: Sequence[float], *, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
    """The 95 % t interval of the mean of independent values, cut to where a value can lie.

    Of one value nothing is known but that. Sums are exact, so that no order or batch changes a bit of it.
    """
    count = len(values)
    if count < 2:
        return low, high
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t95(count - 1) * math.sqrt(variance / count)
    return max(low, mean - half), min(high, mean + half)


def t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t: by its finite series (Abramowitz and Stegun 26.7.3 and 26.7.4), and
    for many degrees of freedom by Fisher's expansion (26.7.5).
    """
    if freedom > _MANY:
        return _expanded(freedom)
    inside, outside = 0.0, math.pi / 2  # angles whose tangent is t / sqrt(freedom)
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if _share(middle, freedom) < _LEVEL else (inside, middle)
    return math.sqrt(freedom) * math.tan((inside + outside) / 2)


def _share(angle: float, freedom: int) -> float:
    """How often |t| is below sqrt(freedom) tan(angle)."""
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _expanded(freedom: int) -> float:
    z = 1.959963984540054  # of the normal distribution
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
