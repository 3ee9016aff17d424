"""Series side by side at one cost: who leads, who cannot be told apart from the leader, and by how much series
differ from one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats
from analysis.facts.matching import INTERPOLATED, NEARBY, cost_levels, cut, dense_gmacs, on_curve, paired
from analysis.frame import records_of

LEVELS = 8  # costs at which series are compared: rankings in words and figures of differences use the same
_Pair = tuple[float, dict[str, Any], dict[str, Any]]  # level, a row, the row it is set against
SAME_COST = 0.01  # a leader that spends more than this share of the dense cost above another has not beaten it


@dataclass(frozen=True)
class Comparison:
    """The trials of several groups at one cost, best first, and how each stands to the leader.

    ``standing``, one a row after the leader: "same" (not told apart), "worse" (told apart at no lower cost),
    "cheaper" (told apart, but the leader also spent more: a lower accuracy says nothing). ``left_out``: (group,
    reason) of those that could not be brought to this cost.
    """

    level: float
    rows: pd.DataFrame
    by: str
    standing: tuple[str, ...]
    p_values: tuple[float, ...] = ()  # corrected (Holm) over all comparisons of the spec; nan without answers
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> list[str]:
        """As sentences name them."""
        return [str(name).replace("_", " ") for name in self.rows[self.by]]

    def others(self, standing: str) -> list[tuple[str, float]]:
        """(name, top-1) of those after the leader that stand so to it."""
        rest = zip(self.names[1:], self.rows["top1"].iloc[1:], self.standing, strict=True)
        return [(name, float(top1)) for name, top1, how in rest if how == standing]

    @property
    def clear(self) -> bool:
        """Whether every other is worse."""
        return set(self.standing) == {"worse"}

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for keys in self.rows["keys"] for key in keys))


@dataclass(frozen=True)
class Versus:
    """A series against another at one cost, on the same images."""

    name: str
    reference: str
    level: float
    gmacs: float
    how: str  # the less direct of the two ways in which they came to this cost
    paired: stats.Paired
    p_holm: float  # corrected over all of a call's comparisons
    bounds: tuple[float, float]  # of the difference, for all of them at once (95 %, Bonferroni)
    keys: tuple[str, ...]

    @property
    def told_apart(self) -> bool:
        return self.p_holm < stats.ALPHA


def comparisons(rows: pd.DataFrame, *, by: str, levels: Sequence[float] | None = None) -> list[Comparison]:
    """The groups of one spec at each cost, best first (``rows``: of ``merge_seeds``).

    Told apart: McNemar's exact test (paired bootstrap for means and interpolated rows) at 5 %, corrected (Holm) over
    all comparisons with a leader at all costs; by intervals that do not overlap where answers are not known.
    """
    levels = cost_levels(rows, by=by, count=LEVELS) if levels is None else levels
    cuts = [cut(rows, level, by=by) for level in levels]
    ranked = [one.rows.sort_values("top1", ascending=False, kind="stable").reset_index(drop=True) for one in cuts]
    pairs = [(i, j) for i, part in enumerate(ranked) for j in range(1, len(part))]
    told = [records_of(part) for part in ranked]
    tests = [paired(told[i][0], told[i][j]) for i, j in pairs]
    known = [place for place, test in enumerate(tests) if test is not None]
    corrected = stats.holm([test.p_value for test in tests if test is not None])
    p = dict(zip((pairs[place] for place in known), corrected, strict=True))
    found = []
    for i, (one, part) in enumerate(zip(cuts, ranked, strict=True)):
        if part.empty:
            continue
        values = [p.get((i, j), np.nan) for j in range(1, len(part))]
        found.append(_standing(one.level, part, by, values, one.left_out, dense_gmacs(rows)))
    return found


def _standing(
    level: float,
    part: pd.DataFrame,
    by: str,
    p_values: list[float],
    left_out: tuple[tuple[str, str], ...],
    dense: float,
) -> Comparison:
    lead, others = part.iloc[0], part.iloc[1:]
    beaten = [bool(high < lead["top1_low"]) for high in others["top1_high"]]
    apart = [bool(p < stats.ALPHA) if p == p else low for p, low in zip(p_values, beaten, strict=True)]
    spared = lead["gmacs_mean"] - others["gmacs_mean"] > SAME_COST * dense
    standing = tuple(
        ("cheaper" if less else "worse") if told else "same" for told, less in zip(apart, spared, strict=True)
    )
    return Comparison(level, part, by, standing, tuple(p_values), left_out)


def versus(rows: pd.DataFrame, reference: str, *, by: str, levels: Sequence[float] | None = None) -> list[Versus]:
    """Every group against one of them, at each cost where both have a row and known answers."""
    levels = cost_levels(rows, by=by, count=LEVELS) if levels is None else levels
    found: list[_Pair] = []
    for level in levels:
        part = records_of(cut(rows, level, by=by).rows)
        base = [row for row in part if row[by] == reference][:1]
        found += [(level, row, other) for other in base for row in part if row is not other]
    return _test(found, by)


def versus_curve(rows: pd.DataFrame, reference: str, *, by: str) -> list[Versus]:
    """Every trial of the other groups against the curve of one group at that trial's own cost."""
    curve = rows[(rows[by] == reference) & ~rows["dense"]]
    others = records_of(rows[(rows[by] != reference) & ~rows["dense"]])
    at = [(row["gmacs_mean"], {**row, "how": NEARBY}, on_curve(curve, row["gmacs_mean"])) for row in others]
    return _test([(level, row, base) for level, row, base in at if base is not None], by)


def _test(pairs: list[_Pair], by: str) -> list[Versus]:
    tests = [(pair, paired(pair[1], pair[2])) for pair in pairs]
    known = [(pair, test) for pair, test in tests if test is not None]
    corrected = stats.holm([test.p_value for _, test in known])
    strict = 1 - (1 - stats.LEVEL) / max(1, len(known))
    wide = [paired(pair[1], pair[2], level=strict) for pair, _ in known]
    bounds = [(one.low, one.high) for one in wide if one is not None]
    return [
        Versus(
            name=str(row[by]),
            reference=str(base[by]),
            level=level,
            gmacs=float(row["gmacs_mean"]),
            how=INTERPOLATED if INTERPOLATED in (row["how"], base["how"]) else str(row["how"]),
            paired=test,
            p_holm=p,
            bounds=wide,
            keys=(*row["keys"], *base["keys"]),
        )
        for ((level, row, base), test), p, wide in zip(known, corrected, bounds, strict=True)
    ]
