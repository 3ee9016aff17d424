"""The answer to a question in at most 25 words, and in a table of at most six rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from analysis import stats, style
from analysis.facts.choice import Choice, neighbours
from analysis.facts.spec import Facts
from analysis.frame import rows_of
from analysis.tables import percent, with_bounds

WORDS = 25
ROWS = 6
OPEN = 0.05  # a bound above this (5 points) says that the images are too few, not that the choice is free


def brief(*candidates: str) -> str:
    """The first that is short enough; else the last, cut."""
    fitting = (text for text in candidates if len(text.split()) <= WORDS)
    return next(fitting, " ".join(candidates[-1].split()[: WORDS - 1]) + " …")


def points(value: float, *, sign: bool = False) -> str:
    return f"{percent(value, sign=sign)} points"


def between(values: Sequence[float], *, sign: bool = False) -> str:
    """The range of values as percent: "0.4 to 2.1", or the one number."""
    return " to ".join(dict.fromkeys(percent(value, sign=sign) for value in (min(values), max(values))))


def of_choice(found: Choice | None, noun: str, groups: int, images: int) -> str:
    """Which to take, or within what the choice does not matter."""
    if found is None:
        alone = "One series alone: there is nothing to rank."
        return f"{groups} series meet at no common cost: nothing is ranked." if groups > 1 else alone
    first, *others = found.best or tuple(found.leads)
    if found.winner is not None:
        gaps = found.clear[found.winner]
        where = "every cost" if len(gaps) == found.costs else f"{len(gaps)} of {found.costs} costs"
        lead = f"clear of every other at {where}, by {between(gaps)} points"
        return brief(f"{found.winner} is the best {noun}: {lead}.", f"{found.winner}: {lead}.")
    last = "" if found.last is None else f"; {found.last[0]} loses {percent(found.last[1])} or more"
    if not found.best:
        leaders = [f"{name} at {count}" for name, count in found.leads.items()]
        return brief(
            f"It depends on the cost: of {found.costs} costs {', '.join(leaders[:3])} leads; each is clearly beaten "
            "at another.",
            f"It depends on the cost: {first} leads at {found.leads[first]} of {found.costs}, and is clearly beaten "
            "elsewhere.",
        )
    if not others:
        return brief(
            f"{first} is the only {noun} that is never clearly beaten at {found.costs} costs{last}.",
            f"{first} is never clearly beaten at {found.costs} costs; every other is.",
        )
    if found.bound is None:
        return brief(f"{first} and {len(others)} more are never clearly beaten at {found.costs} costs{last}.")
    if found.bound > OPEN:
        return brief(
            f"{images:,} images do not decide: between {first} and {len(others)} more up to {points(found.bound)} "
            f"stay open{last}.",
            f"{images:,} images do not decide: up to {points(found.bound)} stay open between {1 + len(others)} of "
            f"{found.groups}.",
        )
    few = f"{first} or {others[0]}" if len(others) == 1 else f"{first}, {others[0]} or {others[-1]}"
    free = f"the choice matters by at most {points(found.bound)}"
    return brief(
        *([f"{few}: between them {free} at any cost{last}."] if len(others) < 3 else []),
        f"{1 + len(others)} of {found.groups}, {first} first: between them {free} at any cost{last}.",
        f"Between {1 + len(others)} of {found.groups} {free} at any cost compared.",
    )


def of_tail(found: Choice, share: float) -> str:
    """Within what the choice does not matter, from a share of the dense cost on."""
    first, *others = found.best
    last = "" if found.last is None else f"; {found.last[0]} loses {percent(found.last[1])} or more"
    start = f"From {100 * share:.0f} % of the dense cost on"
    few = f"between {first} and {others[0] if len(others) == 1 else f'{len(others)} more'}"
    return brief(
        f"{start} the choice {few} matters by at most {points(found.bound or 0.0)}{last}.",
        f"{start} the choice {few} matters by at most {points(found.bound or 0.0)}.",
    )


def table(rows: pd.DataFrame, dense: float, by: str = "variant") -> pd.DataFrame:
    """At most six rows, in their order: name, share of the dense cost, accuracy, told apart from the next or not. Of
    more the first five and the last; the fifth is compared with the sixth, which is not shown.
    """
    told, count = [_told(one) for one in neighbours(rows.iloc[:ROWS])], len(rows)
    rows = rows if count <= ROWS else pd.concat([rows.iloc[: ROWS - 1], rows.iloc[-1:]])
    names = [str(name).replace("_", " ") for name in rows[by]]
    if count > ROWS:
        names[-1] = f"{names[-1]} (last of {count})"
        told[-1] = ""
    shares = ["" if math.isnan(dense) else f"{100 * cost / dense:.0f}" for cost in rows["gmacs_mean"]]
    bounds = rows[["top1", "top1_low", "top1_high"]].to_numpy(dtype=float)
    return pd.DataFrame(
        {
            {"variant": "series"}.get(by, by): names,
            "share of dense cost (%)": shares if any(shares) else [style.cost(cost) for cost in rows["gmacs_mean"]],
            "top-1 (%)": [with_bounds(*row) for row in bounds],
            "told apart from the next": told,
        }
    )


def _told(one: tuple[stats.Paired, float] | None) -> str:
    """Whether a row differs from the next, or by how much at most."""
    if one is None:
        return ""
    test, p = one
    if p < stats.ALPHA:
        return f"yes, by {percent(test.difference)}"
    return f"no, at most {percent(max(abs(test.low), abs(test.high)))} apart"


def short_table(facts: Facts) -> pd.DataFrame:
    """The ranking at the decisive cost; of what meets at none, rows over its range of costs."""
    if facts.decisive is not None:
        return table(facts.decisive.rows, facts.dense, facts.by)
    rows = facts.rows.sort_values("gmacs_mean", ascending=False, kind="stable").reset_index(drop=True)
    last = len(rows) - 1
    chosen = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)}) if last > 0 else list(range(len(rows)))
    rows = rows.loc[chosen]
    if len(set(rows["variant"])) == 1 and rows["budget"].astype(bool).all():
        rows = rows.assign(variant=[f"{row.variant}, {row.budget}" for row in rows_of(rows)])
    return table(rows, facts.dense)
