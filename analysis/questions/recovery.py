"""What training with the reduction in place gives back (Figure 4b and Table A.3 of the ATS paper)."""

from __future__ import annotations

from analysis import stats
from analysis.facts.spec import Facts
from analysis.plots import difference, finetuning
from analysis.published import of_ats
from analysis.questions.base import Question
from analysis.questions.beside import samplers
from analysis.tables import percent
from analysis.words import Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """What finetuning gives back, by series."""
    said, pairs = [], facts.recovered
    corrected = dict(zip(map(id, pairs), stats.holm([one.paired.p_value for one in pairs]), strict=True))
    for name in dict.fromkeys(one.name for one in pairs):
        part = [one for one in pairs if one.name == name]
        moved = [one.paired.difference for one in part]
        clear = sum(corrected[id(one)] < stats.ALPHA for one in part)
        text = (
            f"Finetuning {spoken(name)} with the reduction in place changes top-1 by {percent(min(moved), sign=True)} "
            f"to {percent(max(moved), sign=True)} points at the same setting; told apart at {clear} of "
            f"{len(part)} (Holm)."
        )
        keys = tuple(dict.fromkeys(key for one in part for key in one.keys))
        said.append(Finding(text, keys=keys, headline=True))
    return said


QUESTION = Question(found=found, plots=(finetuning.PLOT, difference.PLOT), printed=of_ats("Table A.3"), claims=samplers)
