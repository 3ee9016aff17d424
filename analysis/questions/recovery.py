"""What training with the reduction in place gives back (Figure 4b and Table A.3 of the ATS paper)."""

from __future__ import annotations

from analysis import stats
from analysis.facts.spec import Facts
from analysis.plots import difference, finetuning
from analysis.published import of_ats
from analysis.questions.base import Question
from analysis.questions.beside import samplers
from analysis.tables import percent
from analysis.verdict import between, brief
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


def _short(facts: Facts) -> str | None:
    """What training gives back, and to whom most."""
    pairs = facts.recovered
    if not pairs:
        return None
    corrected = stats.holm([one.paired.p_value for one in pairs])
    clear = sum(p < stats.ALPHA for p in corrected)
    moved = {one.paired.difference: spoken(one.name) for one in pairs}
    return brief(
        f"Training with the reduction changes top-1 by {between(list(moved), sign=True)} points, told apart at "
        f"{clear} of {len(pairs)} settings; most for {moved[max(moved)]}.",
        f"Training with the reduction changes top-1 by {between(list(moved), sign=True)} points, told apart at "
        f"{clear} of {len(pairs)} settings.",
    )


QUESTION = Question(
    short=_short, found=found, plots=(finetuning.PLOT, difference.PLOT), printed=of_ats("Table A.3"), claims=samplers
)
