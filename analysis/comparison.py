"""Series side by side at one cost: who leads, who cannot be told apart from the leader, and by how much series
differ from one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats, style
from analysis.matching import INTERPOLATED, NEARBY, NOT_AIMED, cost_levels, cut, dense_gmacs, on_curve, paired
from analysis.tables import percent, with_bounds

SAME = "not distinguishable"
LEVELS = 8  # costs at which series are compared: rankings in words and figures of differences use the same
_Pair = tuple[float, dict[str, Any], dict[str, Any]]  # level, a row, the row it is set against
SAME_COST = 0.01  # a leader that spends more than this share of the dense cost above another has not beaten it


@dataclass(frozen=True)
class Finding:
    """A sentence, what stands behind it, and the trials it was computed from; a ``headline`` opens the report."""

    text: str
    detail: str = ""
    keys: tuple[str, ...] = ()
    headline: bool = False


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
        return [spoken(name) for name in self.rows[self.by]]

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
    keys: tuple[str, ...]

    @property
    def told_apart(self) -> bool:
        return self.p_holm < stats.ALPHA


def spoken(variant: object) -> str:
    """A series as sentences name it."""
    return str(variant).replace("_", " ")


def comparisons(rows: pd.DataFrame, *, by: str, levels: Sequence[float] | None = None) -> list[Comparison]:
    """The groups of one spec at each cost, best first (``rows``: of ``merge_seeds``).

    Told apart: McNemar's exact test (paired bootstrap for means and interpolated rows) at 5 %, corrected (Holm) over
    all comparisons with a leader at all costs; by intervals that do not overlap where answers are not known.
    """
    levels = cost_levels(rows, by=by, count=LEVELS) if levels is None else levels
    cuts = [cut(rows, level, by=by) for level in levels]
    ranked = [one.rows.sort_values("top1", ascending=False, kind="stable").reset_index(drop=True) for one in cuts]
    pairs = [(i, j) for i, part in enumerate(ranked) for j in range(1, len(part))]
    tests = [paired(ranked[i].iloc[0].to_dict(), ranked[i].iloc[j].to_dict()) for i, j in pairs]
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
        part = cut(rows, level, by=by).rows.to_dict("records")
        base = [row for row in part if row[by] == reference][:1]
        found += [(level, row, other) for other in base for row in part if row is not other]
    return _test(found, by)


def versus_curve(rows: pd.DataFrame, reference: str, *, by: str) -> list[Versus]:
    """Every trial of the other groups against the curve of one group at that trial's own cost."""
    curve = rows[(rows[by] == reference) & ~rows["dense"]]
    others = rows[(rows[by] != reference) & ~rows["dense"]].to_dict("records")
    at = [(row["gmacs_mean"], {**row, "how": NEARBY}, on_curve(curve, row["gmacs_mean"])) for row in others]
    return _test([(level, row, base) for level, row, base in at if base is not None], by)


def _test(pairs: list[_Pair], by: str) -> list[Versus]:
    tests = [(pair, paired(pair[1], pair[2])) for pair in pairs]
    known = [(pair, test) for pair, test in tests if test is not None]
    corrected = stats.holm([test.p_value for _, test in known])
    return [
        Versus(
            name=str(row[by]),
            reference=str(base[by]),
            level=level,
            gmacs=float(row["gmacs_mean"]),
            how=INTERPOLATED if INTERPOLATED in (row["how"], base["how"]) else str(row["how"]),
            paired=test,
            p_holm=p,
            keys=(*row["keys"], *base["keys"]),
        )
        for ((level, row, base), test), p in zip(known, corrected, strict=True)
    ]


def say(found: Comparison, dense: float) -> Finding:
    """One comparison as a sentence."""
    lead, costs = found.rows.iloc[0], found.rows["gmacs_mean"]
    ends = dict.fromkeys((style.cost(costs.min()), style.cost(costs.max())))
    of_dense = "" if math.isnan(dense) else f" ({100 * found.level / dense:.0f} % of dense)"
    text = (
        f"At {' to '.join(ends)} GMACs{of_dense}: {found.names[0]}, "
        f"{with_bounds(lead['top1'], lead['top1_low'], lead['top1_high'])} %"
    )
    same = [name for name, _ in found.others("same")]
    text += f"; {SAME} from it: {'; '.join(same)}" if same else "; clear of every other" if found.clear else ""
    details = []
    for standing, words in (("worse", "Clearly behind"), ("cheaper", "Behind, but also cheaper")):
        behind = [f"{name} {percent(top1 - lead['top1'], sign=True)}" for name, top1 in found.others(standing)]
        details += [f"{words}, in points: {'; '.join(behind)}."] if behind else []
    between = [name for name, how in zip(found.names, found.rows["how"], strict=True) if how == INTERPOLATED]
    details += [f"Interpolated between its own neighbouring costs: {'; '.join(between)}."] if between else []
    reasons = dict.fromkeys(reason for _, reason in found.left_out if reason != NOT_AIMED)  # these are named once
    left = [
        f"{', '.join(spoken(name) for name, own in found.left_out if own == reason)} ({reason})" for reason in reasons
    ]
    details += [f"Not at this cost: {'; '.join(left)}."] if left else []
    return Finding(f"{text}.", " ".join(details), found.keys)


def tally(found: list[Comparison], noun: str) -> Finding | None:
    """Which ``noun`` is best over all costs compared, who was never clearly beaten, and who always was."""
    if not found:
        return None
    leads: dict[str, list[bool]] = {}  # at each cost that a group leads: whether it is clear of every other
    met: dict[str, list[str]] = {}  # how each group stood wherever it was compared
    for one in found:
        leads.setdefault(one.names[0], []).append(one.clear)
        for name, standing in zip(one.names, ("lead", *one.standing), strict=True):
            met.setdefault(name, []).append(standing)
    ranked = sorted(leads.items(), key=lambda item: -len(item[1]))
    clear = sum(one.clear for one in found)
    said = [_verdict(noun, ranked, len(found))]
    # behind and a little cheaper everywhere is not even with anybody
    even = [n for n, standing in met.items() if "worse" not in standing and set(standing) != {"cheaper"}]
    beaten = [name for name, standing in met.items() if set(standing) == {"worse"}]
    said += [f"Never clearly beaten: {_few(even)}"] if even and clear != len(found) else []
    said += [f"Clearly behind wherever compared: {_few(beaten)}"] if beaten else []
    apart = sum(standing != "same" for one in found for standing in one.standing)
    total = sum(len(one.standing) for one in found)
    said += [f"Of {total} comparisons with a leader {apart} are told apart (Holm), {total - apart} are not"]
    keys = tuple(dict.fromkeys(key for one in found for key in one.keys))
    return Finding(". ".join(said) + ".", keys=keys, headline=True)


def natural(found: list[Comparison]) -> Finding | None:
    """Which groups were run at settings of their own and not at a common cost: none of the comparisons holds them."""
    always = [{name for name, reason in one.left_out if reason == NOT_AIMED} for one in found]
    names = [name for name, _ in found[0].left_out if all(name in part for part in always)] if found else []
    if not names:
        return None
    return Finding(f"Run at settings of their own, not at a common cost, and ranked nowhere: {_listed(names)}.")


def _listed(names: list[str]) -> str:
    return "; ".join(map(spoken, names))


def _few(names: list[str], most: int = 6) -> str:
    """Names in a sentence; of very many the first, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most + 1 else ""
    return "; ".join(names[:most] if more else names) + more


def _verdict(noun: str, ranked: list[tuple[str, list[bool]]], costs: int) -> str:
    """Who is best, in one sentence that says how sure that is, for each leader on its own."""
    leaders = [
        f"{name} has the highest top-1 at {len(clear)} of {costs} costs"
        + (f" (clear of every other at {sum(clear)})" if any(clear) else "")
        for name, clear in ranked
    ]
    text = "; ".join(leaders) + ("" if any(any(clear) for _, clear in ranked) else "; at none clear of every other")
    best = len(ranked) == 1 and 2 * sum(ranked[0][1]) >= costs
    return f"Best {noun}: {text}" if best else f"No {noun} is clearly best: {text}"
