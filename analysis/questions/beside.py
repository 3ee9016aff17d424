"""Published values beside ours: each claim of a paper with what was measured here that comes nearest to it.

Models and data differ, so both are given as the change to the dense model at a share of its cost; absolute numbers
follow in brackets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import stats, style
from analysis.facts.matching import against_dense, paired
from analysis.facts.spec import Facts
from analysis.frame import records_of, reducer_names
from analysis.published import Printed, printed, share
from analysis.questions.base import Line, Question
from analysis.tables import percent, with_bounds
from analysis.words import spoken

NEAREST = 0.06  # of the dense cost: how far from a claim's cost ours may lie
SAMPLERS = {"top-K": (["topk"], "top-K"), "inverse transform": (["ats"], "ATS inverse transform")}  # Table A.3
COLUMNS = ("what", "published", "measured here", "trials")

Row = dict[str, Any]


def beside(question: Question, facts: Facts, *, patches: int | None = None) -> pd.DataFrame:
    """One line for each published claim that a spec's trials speak to, as text with full trial keys."""
    lines = question.claims(facts, patches) if len(facts.rows) else []
    return pd.DataFrame(lines, columns=list(COLUMNS))


def records(facts: Facts) -> list[Row]:
    return records_of(facts.rows)


def samplers(facts: Facts, patches: int | None) -> list[Line]:
    """Inverse transform and top-K, finetuned and off the shelf."""
    lines, cost = [], share(printed("Table 1", "ATS"))
    for words, (name, method) in SAMPLERS.items():
        for tuned in (True, False):
            part = [row for row in records(facts) if bool(row["finetuned"]) == tuned]
            found = nearest(part, facts, cost, lambda row, n=name: reducer_names(row["reducer"]) == n)  # type: ignore[misc]
            if found is not None or tuned:
                known = "" if tuned else " (finetuned; ours is off the shelf)"
                what = f"{words}, {'finetuned' if tuned else 'off the shelf'} (Table A.3)"
                lines.append(line(what, in_words(printed("Table A.3", method)) + known, found, facts))
    return lines


def order(facts: Facts, claim: str) -> list[Line]:
    """The series from best to worst by their mean change to dense near half the dense cost."""
    found = []
    for name in facts.series:
        row = nearest(records(facts), facts, 0.5, lambda one, n=name: one["variant"] == n)  # type: ignore[misc]
        found += [row] if row is not None else []
    if len(found) < 2:
        return []
    ranked = sorted(found, key=lambda row: -row["top1"])
    here = "; ".join(f"{spoken(row['variant'])} {percent(row['top1'])}" for row in ranked)
    keys = " ".join(key for row in ranked for key in row["keys"])
    return [("order at about half the cost", claim, f"{here} (top-1, %){_told(ranked)}", keys)]


def _told(ranked: Sequence[Row]) -> str:
    """Which of a ranking are told apart from its first: an order of numbers is not yet an order."""
    tests = [(row, paired(ranked[0], row)) for row in ranked[1:]]
    known = [(row, test) for row, test in tests if test is not None]
    if not known:
        return ""
    corrected = stats.holm([test.p_value for _, test in known])
    names = [spoken(row["variant"]) for (row, _), p in zip(known, corrected, strict=True) if p < stats.ALPHA]
    return f"; told apart from the first (Holm): {', '.join(names) or 'none'}"


def nearest(rows: Sequence[Row], facts: Facts, share: float, chosen: Callable[[Row], bool]) -> Row | None:
    """The chosen row nearest to a share of the dense cost; None where none is near."""
    part = [row for row in rows if chosen(row)]
    row = min(part, key=lambda one: abs(one["gmacs_mean"] / facts.dense - share), default=None)
    return row if row is not None and abs(row["gmacs_mean"] / facts.dense - share) <= NEAREST else None


def in_words(claim: Printed) -> str:
    """A published DeiT-S value: "−0.1 points at 63 % (79.7; 2.9 of 4.6 GFLOPs)"."""
    change = percent((claim.top1 - printed("Table 1", "").top1) / 100, sign=True)
    if math.isnan(claim.gflops):
        return f"{change} points ({claim.top1:g}; GFLOPs matched)"
    of = f"{claim.gflops:g} of {printed('Table 1', '').gflops:g} GFLOPs"
    return f"{change} points at {100 * share(claim):.0f} % ({claim.top1:g}; {of})"


def line(what: str, claim: str, row: Mapping[str, Any] | None, facts: Facts) -> Line:
    if row is None:
        return what, claim, "not measured near this cost", ""
    share, test = row["gmacs_mean"] / facts.dense, against_dense(row)
    change = with_bounds(test.difference, test.low, test.high, sign=True) if test else percent(
        row["top1"] - row["dense_top1"], sign=True
    )  # fmt: skip
    seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
    here = (
        f"{change} points at {100 * share:.0f} % ({percent(row['top1'])}; {style.cost(row['gmacs_mean'])} of "
        f"{style.cost(facts.dense)} GMACs{seeds})"
    )
    return what, claim, here, " ".join(row["keys"])
