"""In which blocks tokens should be reduced (Table A.4 of the ATS paper)."""

from __future__ import annotations

from analysis.facts.spec import Facts
from analysis.plots import placement, tradeoff
from analysis.published import of_ats, printed, printed_rows, share
from analysis.questions.base import Line, Question
from analysis.questions.beside import in_words, line, nearest, records


def _claims(facts: Facts, patches: int | None) -> list[Line]:
    """The paper's four placements of ATS, at the cost of its whole method."""
    stages = {one.setting.removeprefix("stage(s) "): one for one in printed_rows("Table A.4")}
    claims = {f"block{'s' if '-' in stage else ''} {stage}": one for stage, one in stages.items()}
    cost = share(printed("Table 1", "ATS"))
    return [
        line(
            f"ATS at {where} (Table A.4)",
            in_words(claim),
            nearest(records(facts), facts, cost, lambda row, w=where: row["placement"] == w),  # type: ignore[misc]
            facts,
        )
        for where, claim in claims.items()
    ]


QUESTION = Question(
    noun="placement", plots=(placement.PLOT, tradeoff.PLOT), printed=of_ats("Table A.4"), claims=_claims
)
