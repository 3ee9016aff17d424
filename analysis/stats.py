"""Intervals, paired tests, and what a number of images can and cannot tell. Pure functions of numbers and
arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from ablations.records.paired import ALPHA, bonett_price, holm
from ablations.records.paired import mcnemar as mcnemar_p
from ablations.records.wilson import wilson as wilson_bounds

LEVEL = 0.95  # every interval of the project
DRAWS = 4000  # resamples of a bootstrap
DISTINCT = 64  # of so many different values the draws are counted, not the images
POWER = 0.8  # "can tell" means: finds a difference of this size in 80 % of repetitions


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds, all in the unit of the estimate."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two results on the same images: ``difference`` = accuracy of the first minus that of the second (-1 .. 1).

    ``test`` names where ``p_value``, ``low`` and ``high`` come from. "McNemar": the exact test, with Bonett and
    Price's interval. "paired bootstrap": where an image's answer is a mean (over seeds, or of two trials between
    which a cost lies) and there is nothing to count. ``first_only`` and ``second_only`` are images (parts of
    images, in that case) that only one of the two gets right.
    """

    images: int
    first_only: float
    second_only: float
    difference: float
    low: float
    high: float
    p_value: float  # two-sided
    mid_p: float  # McNemar's mid-p (Fagerland, Lydersen and Laake, 2013): less conservative; nan for means
    boot_low: float  # paired bootstrap of the difference, percentile interval
    boot_high: float
    test: str = "McNemar"

    @property
    def discordance(self) -> float:
        """Share of images the two disagree about."""
        return (self.first_only + self.second_only) / self.images


@dataclass(frozen=True)
class Resolution:
    """The smallest difference in accuracy (0 .. 1) that a number of images shows with 80 % power at the 5 %
    level.
    """

    images: int
    unpaired: float
    paired: float


def wilson(correct: float, images: int, *, level: float = LEVEL) -> Interval:
    """A proportion with Wilson's score interval."""
    if images <= 0:
        raise ValueError(f"{images} images: an interval needs at least one")
    return Interval(correct / images, *wilson_bounds(correct, images, z=_z(level)))


def bootstrap(
    values: ArrayLike,
    *,
    statistic: Callable[..., NDArray[np.float64]] = np.mean,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over images: ``statistic(resampled, axis=1)`` of ``draws`` samples with
    replacement.

    The mean of values of which few differ (right or wrong, whole tokens) needs no sample of images: how often each
    value is drawn is multinomial, which is the same distribution at a cost that does not grow with the images.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"values of shape {data.shape}: a bootstrap needs one number an image, and at least one image")
    random = np.random.default_rng(seed)
    found = _drawn_means(data, draws, random) if statistic is np.mean else None
    if found is None:
        chunk = max(1, 2_000_000 // len(data))  # resampled values in memory at a time
        sizes = [min(chunk, draws - start) for start in range(0, draws, chunk)]
        parts = [statistic(data[random.integers(len(data), size=(size, len(data)))], axis=1) for size in sizes]
        found = np.concatenate(parts)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(data[None], axis=1)[0]), float(low), float(high))


def accuracy(correct: ArrayLike, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> Interval:
    """A share of right answers (0 .. 1, or an image's mean over seeds) with its bootstrap interval over images.

    Where every image has the same answer a bootstrap knows no spread: Wilson's interval stands in.
    """
    data = np.asarray(correct, dtype=np.float64)
    if data.ndim == 1 and len(data) and np.ptp(data) == 0:
        return wilson(float(data.sum()), len(data), level=level)
    return bootstrap(data, draws=draws, level=level, seed=seed)


def mcnemar(first: ArrayLike, second: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS) -> Paired:
    """Compare two trials by the images on which they disagree: the exact test, Bonett and Price's interval."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    _same_images(a, b)
    n, a_only, b_only = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    bounds = bonett_price(a_only, b_only, n, z=_z(level))
    boot = bootstrap(a.astype(np.float64) - b, draws=draws, level=level)
    return Paired(n, a_only, b_only, (a_only - b_only) / n, *bounds, *mcnemar_p(a_only, b_only), boot.low, boot.high)


def paired_bootstrap(first: ArrayLike, second: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS) -> Paired:
    """Compare two results by their difference on each image, whatever numbers these are.

    p: twice the smaller share of resamples on one side of zero, each share with one sample added (never 0).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    _same_images(a, b)
    apart = a - b
    random = np.random.default_rng(0)
    means = _drawn_means(apart, draws, random)
    if means is None:
        means = apart[random.integers(len(apart), size=(draws, len(apart)))].mean(axis=1)
    tails = ((means <= 0).sum() + 1) / (draws + 1), ((means >= 0).sum() + 1) / (draws + 1)
    low, high = (float(bound) for bound in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    more, less = float(np.clip(apart, 0, None).sum()), float(np.clip(-apart, 0, None).sum())
    p = min(1.0, 2 * float(min(tails)))
    return Paired(len(a), more, less, float(apart.mean()), low, high, p, math.nan, low, high, "paired bootstrap")


def paired(first: ArrayLike, second: ArrayLike, *, level: float = LEVEL) -> Paired:
    """McNemar's test where both sides are right or wrong, else the paired bootstrap."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    return mcnemar(a > 0.5, b > 0.5, level=level) if binary else paired_bootstrap(a, b, level=level)


def resolution(images: int, *, accuracy: float, discordance: float) -> Resolution:
    """The smallest differences ``images`` can show: between two independent sets of them, and on the same
    images.

    Unpaired: two proportions near ``accuracy``, normal approximation. Paired: Connor's formula (1987) for
    McNemar's test where two models disagree about a share ``discordance`` of the images, or by the difference
    itself if that is more.
    """
    if images <= 0:
        raise ValueError(f"{images} images: at least one is needed")
    alpha, beta = _z(1 - ALPHA), float(scipy_stats.norm.ppf(POWER))
    unpaired = (alpha + beta) * math.sqrt(2 * accuracy * (1 - accuracy) / images)
    paired = (alpha + beta) * math.sqrt(discordance / images)
    for _ in range(100):  # fixed point of d = (z_a sqrt(psi) + z_b sqrt(psi - d^2)) / sqrt(n)
        psi = max(discordance, paired)
        inner = math.sqrt(max(0.0, psi - paired**2))
        paired = min(1.0, (alpha * math.sqrt(psi) + beta * inner) / math.sqrt(images))
    return Resolution(images, min(1.0, unpaired), min(1.0, paired))


def spearman(first: ArrayLike, second: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Spearman's rank correlation with Bonett and Wright's interval (2000); nan where one side never
    varies.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rho = float(scipy_stats.spearmanr(a, b).statistic)
    if abs(rho) >= 1:
        return Interval(rho, rho, rho)
    half = _z(level) * math.sqrt((1 + rho * rho / 2) / (len(a) - 3))
    return Interval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))


def clustered_spearman(
    first: ArrayLike, second: ArrayLike, *, draws: int = 1000, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Spearman's rank correlation of pairs that come in groups, such as the frames of clips: (groups, each) twice. The
    interval is of resampled groups (percentile bootstrap), ranked anew in each draw; nan where one side never varies.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"{a.shape} and {b.shape}: pairs in groups are two arrays (groups, each)")
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Interval(math.nan, math.nan, math.nan)
    groups, each = a.shape
    ones = np.ones((1, a.size))
    rho = float(_weighted_correlation(_weighted_ranks(a.ravel(), ones), _weighted_ranks(b.ravel(), ones), ones)[0])
    random, found = np.random.default_rng(seed), []
    for _ in range(0, draws, _GROUPS_AT_ONCE):
        counts = random.multinomial(groups, np.full(groups, 1 / groups), size=min(_GROUPS_AT_ONCE, draws))
        weights = np.repeat(counts.astype(np.float64), each, axis=1)
        one, other = (_weighted_ranks(values.ravel(), weights) for values in (a, b))
        found.append(_weighted_correlation(one, other, weights))
    low, high = np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(rho, float(low), float(high))


_GROUPS_AT_ONCE = 50  # draws: their ranks are in memory together


def _weighted_ranks(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(draws, n) mean ranks of values that stand ``weights`` (draws, n) times each, ties sharing theirs."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)  # (draws, distinct values)
    ranks: NDArray[np.float64] = (np.cumsum(mass, axis=1) - (mass - 1) / 2)[:, place]
    return ranks


def _weighted_correlation(
    first: NDArray[np.float64], second: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(draws,) Pearson's correlation of (draws, n) values that stand ``weights`` times each; nan without spread."""
    total = weights.sum(axis=1, keepdims=True)
    one, other = (values - (weights * values).sum(axis=1, keepdims=True) / total for values in (first, second))
    spread = np.sqrt((weights * one * one).sum(axis=1) * (weights * other * other).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = (weights * one * other).sum(axis=1) / spread
    return found


def _same_images(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"{a.shape} and {b.shape} outcomes: a paired test needs the same images, at least one")


def _drawn_means(data: NDArray[np.float64], draws: int, random: np.random.Generator) -> NDArray[np.float64] | None:
    """Means of ``draws`` resamples by counting how often each value is drawn; None where too many values differ."""
    values, counts = np.unique(data, return_counts=True)
    if len(values) > DISTINCT:
        return None
    return random.multinomial(len(data), counts / len(data), size=draws) @ values / len(data)


def _z(level: float) -> float:
    return float(scipy_stats.norm.ppf((1 + level) / 2))


__all__ = [
    "ALPHA", "DRAWS", "LEVEL", "Interval", "Paired", "Resolution", "accuracy", "bootstrap", "clustered_spearman",
    "holm", "mcnemar", "paired", "paired_bootstrap", "resolution", "spearman", "wilson",
]  # fmt: skip
