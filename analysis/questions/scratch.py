"""What a reduction costs that a model was trained with from its first update on, against the same without."""

from __future__ import annotations

from analysis import stats
from analysis.facts.matching import paired
from analysis.facts.spec import Facts
from analysis.frame import reducer_names
from analysis.questions.base import Question
from analysis.tables import with_bounds
from analysis.words import SAME, Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """Each reduced model against the one of the same training that reduces nothing."""
    whole = facts.rows[[set(reducer_names(text)) <= {"identity"} for text in facts.rows["reducer"]]]
    if whole.empty:
        return []
    plain = whole.iloc[0].to_dict()
    rows = [row for row in facts.rows.to_dict("records") if row["key"] != plain["key"]]
    tests = [(row, test) for row in rows if (test := paired(row, plain)) is not None]
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


QUESTION = Question(found=found, opens=True)
