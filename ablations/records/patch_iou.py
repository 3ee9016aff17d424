"""Patches said to be of a class against those that are: intersection over union, and two results on the same images.

An image is told by its intersections and then its unions, class by class, so that any choice of images has its own
mean over the classes. NumPy alone.
"""

from __future__ import annotations

import numpy as np

from ablations.records.sign_flips import flips

_ROUNDING = 1e-12  # differences that differ by less are equal


def ious(counts: np.ndarray) -> np.ndarray:
    """(…, 2 K) intersections and unions -> (…, K); NaN of a class that nobody said and nobody is."""
    intersection, union = np.split(np.asarray(counts, dtype=np.float64), 2, axis=-1)
    return np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def miou(counts: np.ndarray) -> np.ndarray:
    """(…, 2 K) intersections and unions -> (…): the mean over the classes that somebody said or is."""
    each = ious(counts)
    known = ~np.isnan(each)
    return np.where(known, each, 0).sum(-1) / np.maximum(known.sum(-1), 1)


def swaps(first: np.ndarray, second: np.ndarray) -> float:
    """The one-sided p-value of the mIoU of ``first`` (n, 2 K) being above that of ``second``, by swapping the two
    results of images: were there no difference, they could as well be each other's.

    Exact for few images on which they differ, drawn otherwise, as in ``sign_flips``.
    """
    gain = second - first
    gain = gain[gain.any(axis=1)]  # to swap the others changes nothing
    ours, theirs, above, total = first.sum(0), second.sum(0), 0, 0
    seen = miou(ours) - miou(theirs)
    for swapped in flips(len(gain)):
        moved = swapped.astype(np.float64) @ gain
        above += int((miou(ours + moved) - miou(theirs - moved) >= seen - _ROUNDING).sum())
        total += len(swapped)
    drawn = int(total < 2 ** len(gain))  # where not all are looked at, what was seen counts as one more
    return (above + drawn) / (total + drawn)
