"""The images of a search in parts that share none: what is searched on, and what is looked at once, to confirm.

Both by the hash of what an image shows, so that the choice depends neither on names nor on order nor on labels, and
two copies of one picture lie on the same side. Fixed before anything runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ablations.search.errors import SearchError
from ablations.workloads.base import Workload, subset

SEARCH_SHARE = 0.4  # of the images: the search screens many, the confirmation decides and needs the power
RUNGS = (64, 256)  # images of the first rungs; the last is the whole search part
LEAST = 50  # images to confirm on: with fewer, even ten points are not told apart
_Z = 1.959964 + 0.841621  # a two-sided test at 5 % that finds the difference four times in five
_DISAGREE = 0.15  # share of images on which two reduced models disagree, about, at half of the cost

CONFIRMATION = "confirmation"


@dataclass(frozen=True)
class Parts:
    """Positions of images, each in at most one part."""

    rungs: tuple[tuple[int, ...], ...]  # what each rung adds to the one before
    confirmation: tuple[int, ...]

    @property
    def search(self) -> tuple[int, ...]:
        """All that is searched on, in the order in which rungs take it."""
        return tuple(position for rung in self.rungs for position in rung)

    @property
    def all(self) -> tuple[tuple[int, ...], ...]:
        """Every part: those of the rungs, then that of the confirmation."""
        return (*self.rungs, self.confirmation)


def part(workload: Workload, calibration: Workload | None) -> Parts:
    """The parts of a workload; what also calibrates is in none of them.

    Raises:
        SearchError: too few images would be left to confirm anything.
    """
    known = set() if calibration is None else set(_hashes(calibration))
    hashes = _hashes(workload)
    order = sorted((shown, position) for position, shown in enumerate(hashes) if shown not in known)
    parts = _parts(order)
    if len(parts.confirmation) < LEAST:
        least, many = (math.ceil(images / (1 - SEARCH_SHARE)) for images in (LEAST, images_needed(0.02)))
        besides = " beside those that calibrate (a quarter of a folder, at most 128)" if calibration is not None else ""
        raise SearchError(
            f"{len(workload)} images leave {len(parts.confirmation)} to confirm on, which tell nothing apart: about "
            f"{images_needed(0.10)} tell ten points apart, {images_needed(0.02)} two. Give at least {least} images"
            f"{besides}, {many} for two points"
        )
    return parts


def _parts(order: Sequence[tuple[str, int]]) -> Parts:
    """``order``: (hash, position), ascending."""
    wanted = round(SEARCH_SHARE * len(order))
    while 0 < wanted < len(order) and order[wanted - 1][0] == order[wanted][0]:
        wanted += 1  # a copy lies where its original lies
    chosen = [position for _, position in order]
    search = chosen[:wanted]
    ends = [0, *(rung for rung in RUNGS if rung < wanted), wanted]
    rungs = tuple(tuple(search[start:stop]) for start, stop in itertools.pairwise(ends) if stop > start)
    return Parts(rungs, tuple(chosen[wanted:]))


def images_needed(difference: float, *, disagree: float = _DISAGREE) -> int:
    """Images on which two results that differ by ``difference`` (0.02: two points) are told apart four times in five,
    where they disagree on the share ``disagree`` of them (McNemar's test, Connor 1987).
    """
    disagree = max(disagree, difference)
    return math.ceil(disagree * (_Z / difference) ** 2)


def difference_seen(images: int, *, disagree: float = _DISAGREE) -> float:
    """The inverse of ``images_needed``: the difference that so many images tell apart four times in five."""
    return min(1.0, _Z * math.sqrt(disagree / images))


def workload_of(workload: Workload, positions: Sequence[int]) -> Workload:
    """A part as a workload of its own, whose digest names it."""
    return dataclasses.replace(subset(workload, positions), skipped=(), account=None)


def _hashes(workload: Workload) -> list[str]:
    """What each image shows, as a hash of its pixels."""
    return [hashlib.sha256(np.ascontiguousarray(image).data).hexdigest() for image in workload.pixels]
