"""What may be said at the end: finalists against the best single method, on images that the search never saw.

The comparator is chosen on the search images, before the confirmation images are looked at; every finalist is tested
against it there, and Holm's correction goes over all tests of one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ablations.records.paired import ALPHA, bonett_price, holm
from ablations.records.wilson import Z95
from ablations.search.race import Standing
from ablations.search.rungs import Test

FINALISTS = 3  # of at most five: each further one makes every test a little harder


@dataclass(frozen=True)
class Comparison:
    """A finalist beside the comparator on the confirmation images."""

    difference: float  # of the means
    low: float  # its 95 % interval
    high: float
    p: float  # two-sided
    adjusted: float  # … corrected over all tests of the call

    @property
    def better(self) -> bool:
        """The finalist is better, told apart."""
        return self.difference > 0 and self.adjusted < ALPHA

    @property
    def worse(self) -> bool:
        return self.difference < 0 and self.adjusted < ALPHA


def finalists(complete: Sequence[Standing], comparator: Standing, *, limit: int = FINALISTS) -> list[Standing]:
    """The candidates to confirm: the best on the search images, if they are better there than the comparator.

    Args:
        complete: candidates that were looked at on the whole search part, the best first.
        comparator: the best single method there.
        limit: at most so many.
    """
    others = [one for one in complete if not _same(one, comparator)]
    return [one for one in others if one.mean > comparator.mean][:limit]


def _same(one: Standing, other: Standing) -> bool:
    """They ask for the same placement of the same weights."""
    return (one.candidate.stages, one.candidate.training) == (other.candidate.stages, other.candidate.training)


def difference_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean difference over the same images, (n,) each: Bonett and Price's where values are right
    or wrong, else that of the mean of the differences.
    """
    images, differences = len(first), first - second
    if np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        return bonett_price(int((differences > 0).sum()), int((differences < 0).sum()), images)
    half = Z95 * float(differences.std(ddof=1)) / math.sqrt(images) if images > 1 else math.inf
    return float(differences.mean()) - half, float(differences.mean()) + half


def compare(questions: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], *, test: Test) -> list[list[Comparison]]:
    """For each cost (the comparator's values, those of its finalists) the comparisons, corrected over all costs."""
    pairs = [(values, comparator) for comparator, candidates in questions for values in candidates]
    p_values = [test(values, comparator) for values, comparator in pairs]
    made = [
        Comparison(float(values.mean() - comparator.mean()), *difference_interval(values, comparator), p, adjusted)
        for (values, comparator), p, adjusted in zip(pairs, p_values, holm(p_values), strict=True)
    ]
    sorted_back, start = [], 0
    for _, candidates in questions:
        sorted_back.append(made[start : start + len(candidates)])
        start += len(candidates)
    return sorted_back


def winner(comparisons: Sequence[Comparison]) -> int | None:
    """Which finalist to recommend: of those that are told apart, the one that was best on the search images (they come
    in that order); so that its figures on the confirmation images are not chosen by themselves. None: the comparator.
    """
    return next((place for place, one in enumerate(comparisons) if one.better), None)
