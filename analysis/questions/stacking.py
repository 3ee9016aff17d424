"""Whether a second reducer on top of another pays (Table A.5 of the ATS paper)."""

from __future__ import annotations

import math

import pandas as pd

from analysis import stats, style
from analysis.facts.comparison import Versus
from analysis.facts.matching import INTERPOLATED
from analysis.facts.spec import Facts
from analysis.frame import reducer_names
from analysis.plots import difference, stacking
from analysis.published import of_ats, printed
from analysis.questions.base import Line, Question
from analysis.questions.beside import in_words, line, records
from analysis.tables import percent, with_bounds
from analysis.verdict import OPEN, brief, points
from analysis.words import SAME, Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """Whether stacking pays at equal cost, then what each stack saves and loses against its base with the same
    budget.
    """
    base, pairs = facts.base, facts.versus
    if base is None:
        return []
    said = []
    better = sum(one.told_apart and one.paired.difference > 0 for one in pairs)
    worse = sum(one.told_apart for one in pairs) - better
    if pairs:
        text = (
            f"Against {base} alone at the same cost, stacking {_pays(better, worse, len(pairs))}: of {len(pairs)} "
            f"comparisons {better} clearly better, {worse} clearly worse (Holm), {len(pairs) - better - worse} {SAME}."
        )
        clear = [one for one in pairs if one.told_apart]
        text += f" Told apart: {'; '.join(map(_told, clear))}." if clear else ""
        if any(one.how == INTERPOLATED for one in clear):
            text += (
                f" {base} is interpolated there, on a straight line between two of its budgets: where its curve bends "
                "above that line, the difference is a little too large."
            )
        keys = tuple(dict.fromkeys(key for one in pairs for key in one.keys))
        said.append(Finding(text, keys=keys, headline=True))
    for name in dict.fromkeys(gain.variant for gain in facts.gains):
        part = [gain for gain in facts.gains if gain.variant == name]
        saved, moved = [g.saved for g in part], [g.difference for g in part]
        tested = [g.paired for g in part if g.paired]
        told = f"; told apart at {sum(p.p_value < stats.ALPHA for p in tested)} of {len(tested)}" if tested else ""
        text = (
            f"{name} against {base} with the same budget ({len(part)} budgets): saves {percent(min(saved))} to "
            f"{percent(max(saved))} % of its GMACs; top-1 changes by {percent(min(moved), sign=True)} to "
            f"{percent(max(moved), sign=True)} points{told}."
        )
        said.append(Finding(text, keys=tuple(g.key for g in part)))
    return said


def _pays(better: int, worse: int, count: int) -> str:
    """Whether stacking pays, said no louder than the comparisons allow: more than half of them must agree."""
    if better > count / 2 and not worse:
        return "pays"
    if worse > count / 2 and not better:
        return "does not pay"
    if better and worse:
        return "pays at some costs and not at others"
    if not better and not worse:
        return f"is {SAME} from a smaller budget"
    return f"{'helps' if better else 'harms'} in {better or worse} of {count} cases and is {SAME} in the others"


def _told(one: Versus) -> str:
    difference = with_bounds(one.paired.difference, one.paired.low, one.paired.high, sign=True)
    return f"{spoken(one.name)} at {style.cost(one.gmacs)} GMACs {difference} points"


def _claims(facts: Facts, patches: int | None) -> list[Line]:
    """EViT at keep rate 0.7, alone and with ATS; nothing is in print about other stacks."""
    lines: list[Line] = []
    for row in records(facts):
        used = set(reducer_names(row["reducer"]))
        aims = (row["target_gmacs"] or 0) > 0
        if not math.isclose(row["x"] or math.nan, 0.7, abs_tol=1e-6) or aims or not used <= PRINTED:
            continue
        claim = in_words(printed("Table A.5", f"EViT (30 epochs){'' if used == {'evit'} else ' + ATS'}"))
        lines.append(line(f"{row['variant']}, keep 0.7 (Table A.5)", f"{claim}, 30 epochs", row, facts))
    return lines


def _rows(rows: pd.DataFrame) -> pd.Series[bool]:
    own = rows["source"].str.startswith("EViT") & rows["method"].str.startswith("EViT")
    return of_ats("Table A.5")(rows) | own


def _short(facts: Facts) -> str | None:
    """Whether stacking pays, and by how much, or within what it does not matter."""
    base, pairs = facts.base, facts.versus
    if base is None or not pairs:
        return None
    moved = [one for one in pairs if one.told_apart]
    up = [one.paired.difference for one in moved if one.paired.difference > 0]
    down = [one.paired.difference for one in moved if one.paired.difference < 0]
    if not moved and max(one.bounds[1] - one.bounds[0] for one in pairs) > 2 * OPEN:
        most = max(max(abs(bound) for bound in one.bounds) for one in pairs)
        return (
            f"{pairs[0].paired.images:,} images do not decide: between {base} and its stacks up to {points(most)} "
            "stay open."
        )
    if not moved:
        most, least = max(one.bounds[1] for one in pairs), min(one.bounds[0] for one in pairs)
        return (
            f"It does not matter: at equal cost no stack gains over {points(most)} or loses over {points(-least)} "
            f"against {base} alone."
        )
    word = _pays(len(up), len(down), len(pairs))
    if not down:
        most_gained = spoken(max(moved, key=lambda one: one.paired.difference).name)
        return brief(
            f"Stacking on {base} {word}: {len(up)} of {len(pairs)} gain clearly at equal cost, {most_gained} "
            f"most, {points(max(up), sign=True)}.",
            f"Stacking on {base}: {len(up)} of {len(pairs)} gain clearly at equal cost, at most "
            f"{points(max(up), sign=True)}.",
        )
    if not up:
        return brief(
            f"Stacking on {base} {word}: {len(down)} of {len(pairs)} lose clearly at equal cost, up to "
            f"{points(-min(down))}.",
            f"Stacking on {base}: {len(down)} of {len(pairs)} lose clearly at equal cost, up to {points(-min(down))}.",
        )
    return (
        f"Against {base} at equal cost {len(up)} of {len(pairs)} stacks gain clearly, up to {points(max(up))}; "
        f"{len(down)} lose, up to {points(-min(down))}."
    )


PRINTED = {"evit", "ats"}
QUESTION = Question(
    short=_short,
    noun="stack",
    found=found,
    opens=True,
    plots=(stacking.PLOT, difference.PLOT),
    printed=_rows,
    claims=_claims,
    finetuned_in_print=True,
)
