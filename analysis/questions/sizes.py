"""Whether a reduced large model beats a small one that is left whole (Figure 4a of the ATS paper)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from analysis import stats, style
from analysis.facts.matching import on_curve, paired
from analysis.facts.spec import Facts
from analysis.plots import scaling
from analysis.questions.base import Question, cheapest_like_dense
from analysis.tables import with_bounds
from analysis.words import SAME, Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """Each larger model reduced to the cost of the next smaller one left whole."""
    said = []
    for (small, whole), (large, own) in itertools.pairwise(facts.models.items()):
        cost = whole.dense
        for name, part in own.rows.groupby("variant", sort=False) if not math.isnan(cost) else ():
            row = on_curve(part, cost) or part.loc[(part["gmacs_mean"] - cost).abs().idxmin()].to_dict()
            test = paired(row, {"answers": whole.trials.iloc[0].get("dense_answers")})
            if test is not None:
                change = with_bounds(test.difference, test.low, test.high, sign=True)
                told = "" if test.p_value < stats.ALPHA else f", {SAME}"
                text = (
                    f"{large} with {spoken(name)} at {style.cost(row['gmacs_mean'])} GMACs against {small} left whole "
                    f"at {style.cost(cost)}: {change} points{told}."
                )
                said.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    for name, own in facts.models.items():
        for one in cheapest_like_dense(own):
            said.append(replace(one, text=f"{name}, {one.text}"))
    return said


QUESTION = Question(found=found, ranked=False, plots=(scaling.PLOT,), across=True)
