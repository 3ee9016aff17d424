"""When a candidate ends: pure functions of what is known, asked by the serial run and by Tune's scheduler alike.

Successive halving on nested sets of images (Jamieson and Talwalkar, 2016; asynchronously: Li et al., 2020): of those
that reached a rung, the better part goes on. A candidate that a paired test on the same images finds worse than the
incumbent ends at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

GOES_ON = 3  # one in so many of a rung goes on to the next …
SEEN = 6  # … once so many have reached it
WORSE = 0.05  # ended below this p-value, whatever its place among the others

Test = Callable[[np.ndarray, np.ndarray], float]
"""(values of one, values of another) over the same images -> two-sided p-value of the paired test."""


def goes_on(values: np.ndarray, incumbent: np.ndarray | None, seen: Sequence[float], *, test: Test) -> tuple[bool, str]:
    """Whether a candidate goes on to the next rung, and in words why not.

    Args:
        values: (n,) the candidate's values, image by image, of all rungs up to this one.
        incumbent: (n,) those of the best so far, on the same images; None where there is none.
        seen: mean values of the candidates that reached this rung before.
        test: the task's paired test.
    """
    mean = float(values.mean())
    if incumbent is not None and mean < float(incumbent.mean()) and test(values, incumbent) < WORSE:
        return False, "worse than the best so far"
    if len(seen) >= SEEN:
        place = sum(other > mean for other in seen)
        if place >= (len(seen) + 1) / GOES_ON:
            return False, f"not among the better third of {len(seen) + 1}"
    return True, ""
