"""Two results on the same images where each image has a number and not only right or wrong: the sign-flip test.

Under the null hypothesis the difference of an image is as likely to be its negative (R. A. Fisher, 1935), so that every
flip of signs is as likely as what was seen. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

EXACT = 14  # differences other than zero up to which every flip is looked at
DRAWS = 9999  # else so many are drawn
_AT_ONCE = 1 << 22  # signs in memory
_ROUNDING = 1e-12  # sums that differ by less, as a share of all differences, are equal


@dataclass(frozen=True)
class SignFlips:
    """The p-values of a mean difference."""

    greater: float  # one-sided: it is above 0
    either: float  # two-sided: it is not 0
    exact: bool


def sign_flips(differences: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> SignFlips:
    """Test that the mean of ``differences`` (n,) is 0, by flipping signs of images.

    Exact for up to ``EXACT`` differences other than 0. Else ``draws`` flips are drawn and what was seen counts as one
    more, p = (k + 1) / (draws + 1), which holds its level (Phipson and Smyth, 2010).

    Raises:
        ValueError: a difference is not finite.
    """
    found = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError("a difference is not finite; only images on which both results have a number can be compared")
    found = found[found != 0]  # a flip of these changes nothing
    seen, slack = float(found.sum()), _ROUNDING * float(np.abs(found).sum())
    exact = len(found) <= EXACT
    above = beyond = total = 0
    for signs in flips(len(found), draws=draws, seed=seed):
        sums = np.where(signs, 1.0, -1.0) @ found
        above += int((sums >= seen - slack).sum())
        beyond += int((np.abs(sums) >= abs(seen) - slack).sum())
        total += len(sums)
    seen_too = 0 if exact else 1  # every flip includes what was seen
    return SignFlips((above + seen_too) / (total + seen_too), (beyond + seen_too) / (total + seen_too), exact)


def flips(count: int, *, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """All flips of ``count`` signs up to ``EXACT`` of them, else ``draws`` from a seed; (some, count) bool each."""
    return _every(count) if count <= EXACT else _drawn(count, draws, seed)


def _every(count: int) -> Iterator[np.ndarray]:
    """All flips of so many signs, (2^count, count) bool, at once."""
    yield np.arange(1 << count)[:, None] >> np.arange(count) & 1 == 1


def _drawn(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Flips drawn from a seed, (some, count) bool, as many at once as fit."""
    # the frozen generator: what is drawn from a seed is the same in every version of NumPy
    random = np.random.RandomState(seed)
    at_once = max(1, _AT_ONCE // count)
    for start in range(0, draws, at_once):
        rows = min(at_once, draws - start)
        bits = np.frombuffer(random.bytes(rows * -(-count // 8)), dtype=np.uint8).reshape(rows, -1)
        yield np.unpackbits(bits, axis=1, count=count).view(bool)
