"""How many tokens to keep: what K costs and what it buys (Figure A.1 of the ATS paper)."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from analysis import style
from analysis.facts.matching import against_dense
from analysis.facts.spec import Facts
from analysis.frame import records_of, reducer_names, rows_of
from analysis.plots import difference, k_effect, tradeoff
from analysis.published import number, of_ats, printed, share
from analysis.questions.base import Line, Question, cheapest_like_dense
from analysis.questions.beside import line, records
from analysis.tables import percent
from analysis.verdict import ROWS, points, table
from analysis.words import Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """What a small, a middle and the largest K cost and reach, for each series; then the cheapest like the dense
    model.
    """
    rows = facts.rows[facts.rows["x"].notna()]
    said = []
    for name, group in rows.groupby("variant", sort=False):
        group = group.sort_values("x").reset_index(drop=True)
        chosen = group.loc[sorted({0, len(group) // 3, 2 * len(group) // 3, len(group) - 1})]
        parts = [f"K = {row.x:g}: {style.cost(row.gmacs_mean)} GMACs, {percent(row.top1)} %" for row in rows_of(chosen)]
        said.append(Finding(f"{spoken(name)}: {'; '.join(parts)}.", keys=tuple(chosen["key"]), headline=True))
    return said + [replace(one, headline=True) for one in cheapest_like_dense(facts, rows)]


def _claims(facts: Facts, patches: int | None) -> list[Line]:
    """The one point of Figure A.1 that is stated, at the same share of the patches."""
    ats = [row for row in records(facts) if reducer_names(row["reducer"]) == ["ats"] and not pd.isna(row["x"])]
    printed_k = number("Figure A.1", "ATS", "K = ")
    count = printed_k if not patches else printed_k * patches / PATCHES
    row = min(ats, key=lambda one: abs(one["x"] - count), default=None)
    if row is None:
        return []
    known, dense = printed("Figure A.1", "ATS"), printed("Table 1", "")
    claim = f"about {known.gflops:g} of {dense.gflops:g} GFLOPs, {100 * share(known):.0f} % of dense"
    what = f"ATS, one stage, K = {row['x']:g} (Figure A.1: K = {printed_k:g} of {PATCHES})"
    return [line(what, claim, row, facts)]


MARGIN = 0.01  # a loss that most would accept, 1 point


def _short(facts: Facts) -> str | None:
    """The least that may be kept for a loss of a point, each trial on its own."""
    rows = records_of(facts.rows[facts.rows["x"].notna()].sort_values("gmacs_mean", kind="stable"))
    tests = [(row, test) for row in rows if (test := against_dense(row)) is not None]
    if not tests:
        return None
    near = [(row, test) for row, test in tests if test.low >= -MARGIN]
    row, test = near[0] if near else max(tests, key=lambda pair: pair[1].low)
    share = "" if math.isnan(facts.dense) else f", {100 * row['gmacs_mean'] / facts.dense:.0f} % of the dense cost"
    return (
        f"{spoken(row['variant'])} with K = {row['x']:g}{share}, loses at most "
        f"{points(max(0.0, -test.low))}{'' if near else '; no K is sure to lose less'}."
    )


def _few(facts: Facts) -> pd.DataFrame:
    rows = facts.rows[facts.rows["x"].notna()].sort_values(["x", "variant"], ascending=False, kind="stable")
    chosen = rows.iloc[sorted({round(i * (len(rows) - 1) / (ROWS - 1)) for i in range(ROWS)})] if len(rows) else rows
    chosen = chosen.sort_values("top1", ascending=False, kind="stable")
    return table(chosen.assign(variant=[f"{row.variant}, K = {row.x:g}" for row in rows_of(chosen)]), facts.dense)


PATCHES = 196  # of DeiT-S at 224 pixels
QUESTION = Question(
    short=_short,
    few=_few,
    found=found,
    plots=(tradeoff.PLOT, k_effect.PLOT, difference.PLOT),
    printed=of_ats("Figure A.1"),
    note="The curves of Figure A.1 are not given as numbers; only this point is stated.",
    claims=_claims,
)
