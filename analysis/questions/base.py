"""What a kind of question is, and what every kind is told: who leads at equal cost, seeds, targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from analysis import stats, style, verdict
from analysis.facts.choice import bounded
from analysis.facts.matching import against_dense
from analysis.facts.spec import Facts
from analysis.frame import records_of
from analysis.plots import Drawn, Plot, Scene, difference, tradeoff
from analysis.published import Choose
from analysis.tables import percent, with_bounds
from analysis.words import SAME, Finding, natural, say, spoken, tally

Line = tuple[str, str, str, str]  # a claim in print: what, published, measured here, trials
NOTHING = Finding("No trial of this spec carries what its question needs.", headline=True)


@dataclass(frozen=True)
class Question:
    """A kind of question: how its facts are told and drawn, and what is in print about it."""

    noun: str = "series"  # what a spec chooses between
    found: Callable[[Facts], list[Finding]] = lambda facts: []  # its own answer
    ranked: bool = True  # whether who leads at equal cost is asked as well
    opens: bool = False  # whether its own answer comes before who leads
    each_cost: bool = False  # whether who leads at each cost opens the report
    like_dense: bool = False  # whether the cheapest trial that equals the dense model is asked, of several series too
    plots: tuple[Plot, ...] = (tradeoff.PLOT, difference.PLOT)  # the one that answers first
    more: Callable[[Facts, str, Scene], list[Drawn]] = lambda facts, title, scene: []
    printed: Choose | None = None  # rows of the reference table
    printed_on: str = "DeiT-S mostly"  # the models of those rows
    note: str = ""  # what is in print without numbers
    claims: Callable[[Facts, int | None], list[Line]] = lambda facts, patches: []  # beside the nearest of ours
    finetuned_in_print: bool = False
    across: bool = False  # between models: one section for all of them
    short: Callable[[Facts], str | None] = lambda facts: None  # its own verdict; else what the ranking comes to
    few: Callable[[Facts], pd.DataFrame] = verdict.short_table  # the answer in at most six rows

    @property
    def in_print(self) -> bool:
        return self.printed is not None or bool(self.note)

    def figures(self, facts: Facts, title: str, scene: Scene) -> list[Drawn]:
        """The figures for which the data are there."""
        drawn = [one for plot in self.plots for one in plot.drawn(facts, title, scene)]
        return drawn + self.more(facts, title, scene)

    def verdict(self, facts: Facts) -> str:
        """The answer in at most 25 words."""
        if facts.rows.empty:
            return "Only the dense model was run: there is nothing to compare."
        own = self.short(facts)
        if own is not None:
            return verdict.brief(own)
        images = int(facts.trials["images"].iloc[0])
        groups, found = facts.rows[facts.by].nunique(), facts.choice
        if found is not None and found.winner is None and (found.bound or 0.0) > verdict.OPEN:
            tail = bounded(facts.comparisons, verdict.OPEN)
            if tail is not None and not math.isnan(facts.dense):
                return verdict.of_tail(tail, tail.level / facts.dense)
        return verdict.of_choice(found, self.noun, groups, images)

    def answers(self, facts: Facts) -> list[Finding]:
        """The findings of a spec, the headlines first."""
        if facts.rows.empty:
            return [Finding("Only the dense model was run: there is nothing to compare.", headline=True)]
        own = self.found(facts)
        return self._ranking(facts, own) if self.ranked else own or [NOTHING]

    def _ranking(self, facts: Facts, own: list[Finding]) -> list[Finding]:
        found, rows = facts.comparisons, facts.rows
        none = f"{rows[facts.by].nunique()} {facts.by}s, none of which meet at a common cost: no ranking."
        head = tally(found, self.noun) or Finding(none, headline=True)
        said = [*own, head] if self.opens else [head, *own]
        each = [say(one, facts.dense) for one in found]
        said += [replace(one, headline=True) for one in each] if self.each_cost else each
        if self.like_dense or (facts.by == "variant" and len(facts.series) == 1):
            said += cheapest_like_dense(facts)
        apart = natural(found)
        said += [apart] if apart else []
        return said + _seed_spread(rows) + _targets(rows)


def cheapest_like_dense(facts: Facts, rows: pd.DataFrame | None = None) -> list[Finding]:
    """For each series its cheapest trial that, like every dearer one, cannot be told apart from the dense
    model; the cheapest series first.
    """
    found = []
    for name, group in (facts.rows if rows is None else rows).groupby("variant", sort=False):
        best, loss = None, None
        for row in records_of(group.sort_values("gmacs_mean", ascending=False)):
            paired = against_dense(row)
            if paired is None or (paired.p_value < stats.ALPHA and paired.difference < 0):
                break
            best, loss = row, paired
        if best is not None and loss is not None:
            share = 100 * best["gmacs_mean"] / facts.dense
            of_dense = "" if math.isnan(share) else f", {share:.0f} % of dense"
            budget = f" ({best['budget']})" if best["budget"] else ""
            change = with_bounds(loss.difference, loss.low, loss.high, sign=True)
            text = (
                f"{spoken(name)}: down to {style.cost(best['gmacs_mean'])} GMACs{of_dense}{budget}, "
                f"{SAME} from the dense model; difference {change} points"
                f"{f', so a loss of up to {percent(-loss.low)} is not excluded' if loss.low < 0 else ''}."
            )
            found.append((best["gmacs_mean"], Finding(text, keys=tuple(best["keys"]))))
    return [finding for _, finding in sorted(found, key=lambda entry: entry[0])]


def _seed_spread(rows: pd.DataFrame) -> list[Finding]:
    """How far seeds lie apart, a source of spread that the intervals over images do not hold."""
    several = rows[rows["seeds"] > 1]
    found = []
    for name, part in several.groupby("variant", sort=False):
        low, high = part["top1_sd"].min(), part["top1_sd"].max()
        keys = tuple(key for keys in part["keys"] for key in keys)
        found.append(
            Finding(
                f"{str(name).replace('_', ' ')}: {int(part['seeds'].min())} seeds; standard deviation of top-1 over "
                f"seeds {percent(low)} to {percent(high)} points. The intervals given are over images, of the mean "
                "over these seeds.",
                keys=keys,
            )
        )
    return found


def _targets(rows: pd.DataFrame) -> list[Finding]:
    """What calibration aimed at and reached, and what it could not."""
    aimed = rows[rows["target_gmacs"].notna()]
    if aimed.empty:
        return []
    off = 100 * (aimed["gmacs_mean"] / aimed["target_gmacs"] - 1)
    fine = aimed["target_reached"].map(lambda value: value is not False).to_numpy(dtype=bool)
    count = aimed["calibration_images"].dropna()
    where = f" on {int(count.iloc[0]):,} calibration images," if len(count) else " on calibration images,"
    text = (
        f"Calibration: {int(fine.sum())} of {len(aimed)} settings reach their target{where} none of which is "
        f"evaluated; on the evaluated images those cost {off[fine].min():+.1f} to {off[fine].max():+.1f} % of it."
        if fine.any()
        else f"Calibration: none of {len(aimed)} settings reaches its target."
    )
    said = [Finding(text.replace("-", "−"))]
    if not fine.all():
        columns = ["variant", "placement", "target_gmacs", "gmacs_mean"]
        missed = [
            f"{_whose(name, placement)} aimed at {style.cost(goal)}, reached {style.cost(cost)} GMACs"
            for name, placement, goal, cost in aimed.loc[~fine, columns].itertuples(index=False)
        ]
        keys = tuple(key for keys in aimed.loc[~fine, "keys"] for key in keys)
        said.append(Finding(f"Targets not reached: {'; '.join(missed)}.", keys=keys))
    return said


def _whose(variant: str, placement: str) -> str:
    """A series with its placement, where its name does not hold it."""
    name = variant.replace("_", " ")
    return name if not placement or placement in name else f"{name}, {placement},"
