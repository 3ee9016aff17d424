"""Whether one training serves every budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis import stats
from analysis.facts.choice import widest
from analysis.facts.matching import MATCH, dense_gmacs, paired
from analysis.facts.spec import Facts
from analysis.facts.transfer import PLAIN
from analysis.frame import records_of
from analysis.plots import transfer
from analysis.questions.base import Question
from analysis.verdict import between, points
from analysis.words import Finding

Row = Mapping[Any, Any]


def _away(facts: Facts) -> dict[str, list[tuple[stats.Paired, Row, Row]]]:
    """By method, every row away from the budget of its training against the training for that budget."""
    rows = facts.trainings[facts.trainings["trained"] != PLAIN]
    near = MATCH * dense_gmacs(facts.trials)
    found: dict[str, list[tuple[stats.Paired, Row, Row]]] = {}
    for method, part in rows.groupby("method", sort=False):
        homes = records_of(part[part["home"]])
        for row in records_of(part[~part["home"]]):
            other = next((home for home in homes if abs(home["gmacs_mean"] - row["gmacs_mean"]) <= near), None)
            test = None if other is None else paired(row, other)
            if other is not None and test is not None:
                found.setdefault(str(method), []).append((test, row, other))
    return found


def found(facts: Facts) -> list[Finding]:
    """What is lost by evaluating at a budget that was not trained for, against the training for that budget."""
    said = []
    for method, tests in _away(facts).items():
        clear = sum(p < stats.ALPHA for p in stats.holm([test.p_value for test, *_ in tests]))
        text = (
            f"{method}: evaluated at a budget it was not trained for, top-1 differs by "
            f"{between([test.difference for test, *_ in tests], sign=True)} points from the training for "
            f"that budget; told apart at {clear} of {len(tests)} (Holm)."
        )
        keys = tuple(dict.fromkeys(key for _, row, _ in tests for key in row["keys"]))
        said.append(Finding(text, keys=keys, headline=True))
    return said


def _short(facts: Facts) -> str | None:
    """What is lost away from the budget of the training, or within what nothing is."""
    lost = {method: [test.difference for test, *_ in tests] for method, tests in _away(facts).items()}
    if not lost:
        return None
    worst = min(lost, key=lambda method: min(lost[method]))
    most = widest([(home, row) for tests in _away(facts).values() for _, row, home in tests])
    return (
        "A training for another budget changes top-1 by "
        f"{between([v for each in lost.values() for v in each], sign=True)} "
        f"points, most for {worst}; a loss over {points(most or 0.0)} is excluded."
    )


QUESTION = Question(short=_short, found=found, ranked=False, plots=(transfer.PLOT,))
