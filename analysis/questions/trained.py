"""What methods with a training of their own are worth: against random drop that was trained as long."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis import style
from analysis.facts.comparison import Versus, versus_curve
from analysis.facts.spec import Facts
from analysis.frame import records_of, reducer_names
from analysis.questions.base import Question
from analysis.tables import percent
from analysis.verdict import points
from analysis.words import SAME, Finding, spoken


def _random(facts: Facts) -> pd.DataFrame:
    """Random drop that was trained, cheapest first."""
    rows = facts.rows[facts.rows["finetuned"]]
    return rows[[reducer_names(text) == ["random"] for text in rows["reducer"]]].sort_values("gmacs_mean")


def against_random(facts: Facts) -> list[Versus]:
    """Every trained row against the curve of trained random drop at its own cost."""
    drop = _random(facts)
    rows = facts.rows[facts.rows["finetuned"]]
    return [] if drop.empty else versus_curve(rows, str(drop["variant"].iloc[0]), by="variant")


def found(facts: Facts) -> list[Finding]:
    """Which methods beat random drop that was trained as long, each at the cost its training came to."""
    rows, drop, met = facts.rows[facts.rows["finetuned"]], _random(facts), against_random(facts)
    if drop.empty:
        return []
    better = [one for one in met if one.told_apart and one.paired.difference > 0]
    worse = [one for one in met if one.told_apart and one.paired.difference < 0]
    same = [one for one in met if not one.told_apart]
    said = [("clearly better", better), ("clearly worse", worse), (SAME, same)]
    parts = [f"{words[0].upper()}{words[1:]}: {_listed(part)}" for words, part in said if part]
    text = f"Against random drop trained as long, in points, each at its own cost (Holm). {'. '.join(parts)}."
    all_said = [Finding(text, keys=tuple(dict.fromkeys(key for one in met for key in one.keys)), headline=True)]
    cheapest = drop.iloc[0]
    for row in records_of(rows[~rows["variant"].isin({*drop["variant"], *(one.name for one in met)})]):
        text = (
            f"{spoken(row['variant'])} came to {style.cost(row['gmacs_mean'])} GMACs and {percent(row['top1'])} %, "
            f"where there is no random drop to compare with: the nearest has {percent(cheapest['top1'])} % at "
            f"{style.cost(cheapest['gmacs_mean'])}."
        )
        all_said.append(Finding(text, keys=(*row["keys"], *cheapest["keys"]), headline=True))
    return all_said


def _listed(part: Sequence[Versus]) -> str:
    """Each series once, with its difference, or the range of them."""
    named = []
    for name in dict.fromkeys(one.name for one in part):
        moved = sorted(one.paired.difference for one in part if one.name == name)
        ends = dict.fromkeys(percent(value, sign=True) for value in (moved[0], moved[-1]))
        named.append(f"{spoken(name)} {' to '.join(ends)}")
    return "; ".join(named)


def _short(facts: Facts) -> str | None:
    """How many beat random drop trained as long, or within what they equal it."""
    met = against_random(facts)
    if not met:
        return None
    clear = {one.paired.difference: spoken(one.name) for one in met if one.told_apart}
    better = len({name for value, name in clear.items() if value > 0})
    count = len({one.name for one in met})
    if not better:
        most = max(one.bounds[1] for one in met)
        return f"None of {count} methods clearly beats random drop trained as long; none gains over {points(most)}."
    return (
        f"{better} of {count} methods clearly beat random drop trained as long, {clear[max(clear)]} most, by "
        f"{points(max(clear))}."
    )


QUESTION = Question(short=_short, noun="method", found=found, opens=True)
