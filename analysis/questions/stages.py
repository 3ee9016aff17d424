"""Whether to drop many tokens once or few in each of several stages (Figure 4c of the ATS paper)."""

from __future__ import annotations

import math

from analysis.facts.matching import against_dense
from analysis.facts.spec import Facts
from analysis.frame import reducer_names, row_nearest
from analysis.plots import difference, single_multi
from analysis.plots.single_multi import saved
from analysis.published import of_ats
from analysis.questions.base import Line, Question
from analysis.questions.beside import NEAREST, line, nearest, records
from analysis.tables import percent, with_bounds
from analysis.words import Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """What is lost at the saving that the paper claims."""
    said = []
    wanted = (1 - saved() / 100) * facts.dense
    for name, part in facts.rows.groupby("variant", sort=False) if not math.isnan(wanted) else ():
        row = row_nearest(part, "gmacs_mean", wanted)
        loss = against_dense(row)
        if loss is not None and abs(row["gmacs_mean"] - wanted) <= NEAREST * facts.dense:
            # The claim in print is ATS's: it says nothing about other reducers.
            ats = reducer_names(row["reducer"]) == ["ats"]
            claim = f" (in print: almost kept at {saved():.0f} %, DeiT-S, finetuned)" if ats else ""
            text = (
                f"{spoken(name)} with {percent(1 - row['gmacs_mean'] / facts.dense)} % of GMACs saved: top-1 changes "
                f"by {with_bounds(loss.difference, loss.low, loss.high, sign=True)} points{claim}."
            )
            said.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    return said


def _claims(facts: Facts, patches: int | None) -> list[Line]:
    rows = [row for row in records(facts) if reducer_names(row["reducer"]) == ["ats"]]
    return [
        line(
            f"{name} (Figure 4)",
            f"{saved():.0f} % of GFLOPs saved, accuracy almost kept (DeiT-S, finetuned)",
            nearest(rows, facts, 1 - saved() / 100, lambda row, n=name: row["variant"] == n),  # type: ignore[misc]
            facts,
        )
        for name in dict.fromkeys(row["variant"] for row in rows)
    ]


QUESTION = Question(
    noun="choice of stages",
    found=found,
    plots=(single_multi.PLOT, difference.PLOT),
    printed=of_ats("Figure 4"),
    note="Printed as curves (ATS, Figure 4); only this is stated.",
    claims=_claims,
    finetuned_in_print=True,
)
