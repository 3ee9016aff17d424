"""Whether a reduced large model beats a small one that is left whole (Figure 4a of the ATS paper)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis import stats, style
from analysis.facts.matching import on_curve, paired
from analysis.facts.spec import Facts
from analysis.frame import row_nearest
from analysis.plots import scaling
from analysis.questions.base import Question, cheapest_like_dense
from analysis.tables import with_bounds
from analysis.verdict import ROWS, table
from analysis.words import SAME, Finding, spoken


def _met(facts: Facts) -> list[tuple[str, str, dict[Any, Any], stats.Paired]]:
    """Each larger model reduced to the cost of the next smaller one, against that one left whole."""
    met = []
    for (small, whole), (large, own) in itertools.pairwise(facts.models.items()):
        for _, part in own.rows.groupby("variant", sort=False) if not math.isnan(whole.dense) else ():
            row = on_curve(part, whole.dense) or row_nearest(part, "gmacs_mean", whole.dense)
            test = paired(row, {"answers": whole.trials.iloc[0].get("dense_answers")})
            if test is not None:
                met.append((small, large, row, test))
    return met


def found(facts: Facts) -> list[Finding]:
    """Each larger model reduced to the cost of the next smaller one left whole."""
    said = []
    for small, large, row, test in _met(facts):
        change = with_bounds(test.difference, test.low, test.high, sign=True)
        told = "" if test.p_value < stats.ALPHA else f", {SAME}"
        text = (
            f"{large} with {spoken(row['variant'])} at {style.cost(row['gmacs_mean'])} GMACs against {small} left "
            "whole "
            f"at {style.cost(facts.models[small].dense)}: {change} points{told}."
        )
        said.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    for name, own in facts.models.items():
        for one in cheapest_like_dense(own):
            said.append(replace(one, text=f"{name}, {one.text}"))
    return said


def _short(facts: Facts) -> str | None:
    """Whether the larger model wins at the smaller one's cost."""
    met = _met(facts)
    if not met:
        return None
    small, large, row, test = max(met, key=lambda one: one[3].difference)
    bounds = with_bounds(test.difference, test.low, test.high, sign=True)
    told = "Hardly" if test.p_value >= stats.ALPHA else "Yes" if test.difference > 0 else "No"
    return (
        f"{told}: {large} reduced to the cost of {small} by {spoken(row['variant'])} changes top-1 by {bounds} points."
    )


def _few(facts: Facts) -> pd.DataFrame:
    """Small models left whole, and the larger ones reduced to their cost."""
    rows = []
    for small, whole in facts.models.items():
        met = [(large, row) for other, large, row, _ in _met(facts) if other == small]
        if met and not whole.rows.empty:
            plain = whole.rows.iloc[0].to_dict()
            answers = plain.get("dense_answers")
            bounds = (
                stats.accuracy(answers) if answers is not None else stats.Interval(whole.dense_top1, math.nan, math.nan)
            )
            rows.append({**plain, "variant": f"{small}, whole", "answers": answers, "gmacs_mean": whole.dense,
                         "top1": bounds.value, "top1_low": bounds.low, "top1_high": bounds.high})  # fmt: skip
            rows += [{**row, "variant": f"{large}, {row['variant']}"} for large, row in met]
    if not rows:
        return table(facts.rows.head(ROWS), facts.dense)
    largest = list(facts.models.values())[-1]
    return table(pd.DataFrame(rows).sort_values("top1", ascending=False), largest.dense)


QUESTION = Question(short=_short, few=_few, found=found, ranked=False, plots=(scaling.PLOT,), across=True)
