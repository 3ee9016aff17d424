"""What finetuning with a reducer in place gives back, and what one training serves, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis import stats, style
from analysis.comparison import SAME, Finding, Versus, spoken, versus_curve
from analysis.matching import MATCH, dense_gmacs, merge_seeds, paired
from analysis.plots import finetuning as _finetuning
from analysis.plots import transfer as _transfer
from analysis.tables import percent

RANDOM = "random, trained as long"  # in ``specs/trained_methods.yaml``: what training alone gives


def against_random(trials: pd.DataFrame) -> list[Finding]:
    """Which methods beat random drop that was trained as long, each at the cost its training came to."""
    rows = merge_seeds(trials[~trials["dense"] & trials["finetuned"]])
    drop = rows[rows["variant"] == RANDOM].sort_values("gmacs_mean")
    if drop.empty:
        return []
    met = versus_curve(rows, RANDOM, by="variant")
    better = [one for one in met if one.told_apart and one.paired.difference > 0]
    worse = [one for one in met if one.told_apart and one.paired.difference < 0]
    same = [one for one in met if not one.told_apart]
    said = [("clearly better", better), ("clearly worse", worse), (SAME, same)]
    parts = [f"{words[0].upper()}{words[1:]}: {_listed(part)}" for words, part in said if part]
    text = f"Against random drop trained as long, in points, each at its own cost (Holm). {'. '.join(parts)}."
    found = [Finding(text, keys=tuple(dict.fromkeys(key for one in met for key in one.keys)), headline=True)]
    cheapest = drop.iloc[0]
    for row in rows[~rows["variant"].isin({RANDOM, *(one.name for one in met)})].to_dict("records"):
        text = (
            f"{spoken(row['variant'])} came to {style.cost(row['gmacs_mean'])} GMACs and {percent(row['top1'])} %, "
            f"where there is no random drop to compare with: the nearest has {percent(cheapest['top1'])} % at "
            f"{style.cost(cheapest['gmacs_mean'])}."
        )
        found.append(Finding(text, keys=(*row["keys"], *cheapest["keys"]), headline=True))
    return found


def _listed(part: Sequence[Versus]) -> str:
    """Each series once, with its difference, or the range of them."""
    named = []
    for name in dict.fromkeys(one.name for one in part):
        moved = sorted(one.paired.difference for one in part if one.name == name)
        ends = dict.fromkeys(percent(value, sign=True) for value in (moved[0], moved[-1]))
        named.append(f"{spoken(name)} {' to '.join(ends)}")
    return "; ".join(named)


def finetuned(trials: pd.DataFrame) -> list[Finding]:
    """What finetuning gives back, by series."""
    found = []
    pairs = _finetuning.pairs(trials)
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
        found.append(Finding(text, keys=keys, headline=True))
    return found


def transferred(trials: pd.DataFrame) -> list[Finding]:
    """What is lost by evaluating at a budget that was not trained for, against the training for that budget."""
    rows = _transfer.labelled(trials)
    rows = rows[rows["trained"] != _transfer.PLAIN]
    found = []
    for method, part in rows.groupby("method", sort=False):
        homes = part[part["home"]].to_dict("records")
        tests = []
        for row in part[~part["home"]].to_dict("records"):
            near = [
                home for home in homes if abs(home["gmacs_mean"] - row["gmacs_mean"]) <= MATCH * dense_gmacs(trials)
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
            found.append(Finding(text, keys=keys, headline=True))
    return found
