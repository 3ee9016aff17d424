"""Wilson's interval of a share: the one that rows record, and that the report falls back on."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(successes: float, total: int, *, z: float = Z95) -> tuple[float, float]:
    """The score interval of a share (E. B. Wilson, 1927): valid near 0 and 1 too, where mean +- 2 s.d. is not.

    ``z``: the two-sided quantile of its level, 95 % by default.
    """
    if total < 1:
        return 0.0, 1.0
    share, square = successes / total, z**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    # rounding must not push the end of an interval past the share it belongs to
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))
