"""What a reduction costs that a model was trained with from its first update on, against the same without."""

from __future__ import annotations

from typing import Any

from analysis import stats
from analysis.facts.matching import paired
from analysis.facts.spec import Facts
from analysis.frame import records_of, reducer_names
from analysis.questions.base import Question
from analysis.tables import with_bounds
from analysis.verdict import points
from analysis.words import SAME, Finding, spoken

Tests = list[tuple[dict[Any, Any], stats.Paired]]


def _against_plain(facts: Facts) -> tuple[dict[Any, Any] | None, Tests]:
    """The model of the same training that reduces nothing, and each other one against it."""
    whole = facts.rows[[set(reducer_names(text)) <= {"identity"} for text in facts.rows["reducer"]]]
    if whole.empty:
        return None, []
    plain = records_of(whole)[0]
    rows = [row for row in records_of(facts.rows) if row["key"] != plain["key"]]
    return plain, [(row, test) for row in rows if (test := paired(row, plain)) is not None]


def found(facts: Facts) -> list[Finding]:
    """Each reduced model against the one of the same training that reduces nothing."""
    plain, tests = _against_plain(facts)
    if plain is None:
        return []
    corrected = stats.holm([test.p_value for _, test in tests])
    return [
        Finding(
            f"{spoken(row['variant'])} costs {100 * row['gmacs_mean'] / plain['gmacs_mean']:.0f} % of "
            f"{spoken(plain['variant'])} and changes its top-1 by "
            f"{with_bounds(test.difference, test.low, test.high, sign=True)} points"
            f"{'' if p < stats.ALPHA else f', {SAME} (Holm)'}.",
            keys=(*row["keys"], *plain["keys"]),
            headline=True,
        )
        for (row, test), p in zip(tests, corrected, strict=True)
    ]


def _short(facts: Facts) -> str | None:
    """The least that a reduction costs."""
    plain, tests = _against_plain(facts)
    if plain is None or not tests:
        return None
    row, test = max(tests, key=lambda pair: pair[1].low)
    share = 100 * row["gmacs_mean"] / plain["gmacs_mean"]
    return (
        f"{spoken(row['variant'])} does least harm: at {share:.0f} % of the cost of {spoken(plain['variant'])} it "
        f"loses at most {points(max(0.0, -test.low))}."
    )


QUESTION = Question(short=_short, found=found, opens=True)
