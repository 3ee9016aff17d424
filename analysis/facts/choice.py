"""Which of several groups to take: one that is clear of the others, or any of several within a bound."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import stats
from analysis.facts.comparison import Comparison
from analysis.facts.matching import paired
from analysis.frame import records_of

LEAST = 0.5  # of the costs compared: at fewer a group has not shown itself


@dataclass(frozen=True)
class Choice:
    """What a ranking at several costs comes to."""

    level: float  # GMACs of the cheapest of the costs
    costs: int
    groups: int
    leads: dict[str, int]  # the costs at which a group has the highest accuracy, most first
    clear: dict[str, tuple[float, ...]]  # by how much a leader beats the second, where it is clear of every other
    best: tuple[str, ...]  # never clearly beaten, those that lead most first
    bound: float | None  # between these the choice loses no more than this, at any cost (95 % for all pairs at once)
    last: tuple[str, float] | None  # who is clearly behind wherever compared, and by how much at least

    @property
    def winner(self) -> str | None:
        """The one that leads, clear of every other at half of the costs at least."""
        first = next(iter(self.leads))
        return first if len(self.leads) == 1 and 2 * len(self.clear.get(first, ())) >= self.costs else None


@dataclass(frozen=True)
class Standings:
    """How each group did at the costs at which it was compared."""

    leads: dict[str, list[bool]]  # at each cost that a group leads, those that lead most first: clear of every other?
    met: dict[str, list[str]]  # how each group stood wherever it was compared: "lead", "same", "worse" or "cheaper"


def standings(found: Sequence[Comparison]) -> Standings:
    leads: dict[str, list[bool]] = {}
    met: dict[str, list[str]] = {}
    for one in found:
        leads.setdefault(one.names[0], []).append(one.clear)
        for name, standing in zip(one.names, ("lead", *one.standing), strict=True):
            met.setdefault(name, []).append(standing)
    return Standings(dict(sorted(leads.items(), key=lambda item: -len(item[1]))), met)


def choice(found: Sequence[Comparison], tests: int = 0) -> Choice | None:
    """None where nothing is compared. Intervals hold for ``tests`` pairs at once, or as many as are needed if more."""
    found = [one for one in found if len(one.rows) > 1]
    if not found:
        return None
    stood = standings(found)
    clear: dict[str, tuple[float, ...]] = {}
    behind: dict[str, list[float]] = {}
    for one in found:
        lead, top1 = one.names[0], one.rows["top1"].to_list()
        if one.clear:
            clear[lead] = (*clear.get(lead, ()), top1[0] - top1[1])
        for name, value in zip(one.names, top1, strict=True):
            behind.setdefault(name, []).append(top1[0] - value)
    leads = {name: len(clear_there) for name, clear_there in stood.leads.items()}
    rank = {name: i for i, name in enumerate(leads)}
    even = [n for n, how in stood.met.items() if set(how) <= {"lead", "same"} and len(how) >= LEAST * len(found)]
    best = tuple(sorted(even, key=lambda name: (rank.get(name, len(rank)), sum(behind[name]) / len(behind[name]))))
    worse = {name: min(behind[name]) for name, how in stood.met.items() if set(how) == {"worse"}}
    last = max(worse.items(), key=lambda item: item[1], default=None)
    return Choice(found[0].level, len(found), len(stood.met), leads, clear, best, _bound(found, best, tests), last)


def bounded(found: Sequence[Comparison], most: float) -> Choice | None:
    """What the ranking comes to from the cheapest cost on from which the choice among the best matters by no more than
    ``most``; the intervals hold for the pairs of all costs at once. None where there is no such cost.
    """
    tests = sum(len(one.rows) - 1 for one in found)
    tails = (choice(found[start:], tests) for start in range(1, len(found)))
    return next(
        (one for one in tails if one and len(one.best) > 1 and one.bound is not None and one.bound <= most), None
    )


def _bound(found: Sequence[Comparison], names: Sequence[str], tests: int) -> float | None:
    """The largest loss that is not excluded for any of ``names`` against the best of them at a cost; the intervals hold
    for all pairs at once (Bonferroni).
    """
    pairs = []
    for one in found:
        rows = [row for row, name in zip(records_of(one.rows), one.names, strict=True) if name in names]
        pairs += [(rows[0], row) for row in rows[1:]]
    return widest(pairs, tests)


def widest(pairs: Sequence[tuple[Mapping[Any, Any], Mapping[Any, Any]]], tests: int = 0) -> float | None:
    """The largest upper bound of first minus second, for all pairs at once; None where answers are not known."""
    level = 1 - (1 - stats.LEVEL) / max(1, len(pairs), tests)
    made = [paired(first, second, level=level) for first, second in pairs]
    highs = [one.high for one in made if one is not None]
    return max(0.0, *highs) if highs and len(highs) == len(made) else None


def decisive(found: Sequence[Comparison], wanted: float) -> Comparison | None:
    """Of the costs at which most groups meet, the one nearest to ``wanted`` GMACs."""
    full = [one for one in found if len(one.rows) > 1]
    most = max((len(one.rows) for one in full), default=0)
    near = [one for one in full if len(one.rows) >= 0.8 * most]
    return min(near, key=lambda one: abs(one.level - wanted), default=None)


def neighbours(rows: pd.DataFrame) -> list[tuple[stats.Paired, float] | None]:
    """Each row against the next: the test, and its p-value corrected over all of them (Holm); None where answers are
    not known, and for the last row.
    """
    records = records_of(rows)
    tests = [paired(one, other) for one, other in itertools.pairwise(records)]
    corrected = iter(stats.holm([test.p_value for test in tests if test is not None]))
    return [*(None if test is None else (test, next(corrected)) for test in tests), *([None] if records else [])]
