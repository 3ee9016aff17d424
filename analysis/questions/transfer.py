"""Whether one training serves every budget."""

from __future__ import annotations

from analysis import stats
from analysis.facts.matching import MATCH, dense_gmacs, paired
from analysis.facts.spec import Facts
from analysis.facts.transfer import PLAIN
from analysis.plots import transfer
from analysis.questions.base import Question
from analysis.tables import percent
from analysis.words import Finding


def found(facts: Facts) -> list[Finding]:
    """What is lost by evaluating at a budget that was not trained for, against the training for that budget."""
    rows = facts.trainings[facts.trainings["trained"] != PLAIN]
    said = []
    for method, part in rows.groupby("method", sort=False):
        homes = part[part["home"]].to_dict("records")
        tests = []
        for row in part[~part["home"]].to_dict("records"):
            near = [
                home
                for home in homes
                if abs(home["gmacs_mean"] - row["gmacs_mean"]) <= MATCH * dense_gmacs(facts.trials)
            ]
            test = paired(row, near[0]) if near else None
            tests += [(test, row)] if test is not None else []
        if tests:
            moved = [test.difference for test, _ in tests]
            clear = sum(p < stats.ALPHA for p in stats.holm([test.p_value for test, _ in tests]))
            text = (
                f"{method}: evaluated at a budget it was not trained for, top-1 differs by "
                f"{percent(min(moved), sign=True)} to {percent(max(moved), sign=True)} points from the training for "
                f"that budget; told apart at {clear} of {len(tests)} (Holm)."
            )
            keys = tuple(dict.fromkeys(key for _, row in tests for key in row["keys"]))
            said.append(Finding(text, keys=keys, headline=True))
    return said


QUESTION = Question(found=found, ranked=False, plots=(transfer.PLOT,))
