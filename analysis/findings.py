"""The answers in plain sentences, computed from the data: who leads at which cost, and what cannot be told
apart. What only one spec's question needs is in ``questions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis import questions, stats, style
from analysis.comparison import SAME, Comparison, Finding, comparisons, natural, say, tally
from analysis.frame import Setting
from analysis.matching import against_dense, dense_cost, merge_seeds
from analysis.plots.clutter import CLUTTER, correlations, hardness, question
from analysis.plots.placement import placement_levels
from analysis.tables import percent

NOUNS = {
    "score_functions": "score",
    "stage_placement": "placement",
    "class_token": "treatment of the class token",
    "sampling_method": "sampler",
    "single_multi_stage": "choice of stages",
    "evit_stacking": "stack",
    "methods": "method",
}  # what a spec chooses between; else "series"


def answers(spec: str, trials: pd.DataFrame) -> list[Finding]:
    """The findings of one spec, the headlines first (``trials``: with answers)."""
    rows = merge_seeds(trials[~trials["dense"]])
    if rows.empty:
        return [Finding("Only the dense model was run: there is nothing to compare.", headline=True)]
    dense = dense_cost(trials)
    special = questions.SPECIAL.get(spec)
    own = special(trials) if special else []
    if spec in questions.WITHOUT_RANKING:
        return own or [Finding("No trial of this spec carries what its question needs.", headline=True)]
    found = compared(spec, trials, rows)
    by = _grouping(spec, rows)
    head = tally(found, NOUNS.get(spec, "series"))
    none = Finding(f"{rows[by].nunique()} {by}s, none of which meet at a common cost: no ranking.", headline=True)
    # Where the question is not who leads, its own answer opens.
    said = [*own, head or none] if spec in questions.OPENING else [head or none, *own]
    each = [say(one, dense) for one in found]
    said += [replace(one, headline=True) for one in each] if spec == "methods" else each
    if spec == "methods" or (spec != "k_values" and by == "variant" and rows["variant"].nunique() == 1):
        said += questions.cheapest_like_dense(rows.assign(dense_gmacs=dense))
    apart = natural(found)
    said += [apart] if apart else []
    said += _seed_spread(rows) + _targets(rows)
    return said


def compared(spec: str, trials: pd.DataFrame, rows: pd.DataFrame) -> list[Comparison]:
    """The ranking of a spec's series (or placements) at each cost."""
    by = _grouping(spec, rows)
    return comparisons(rows, by=by, levels=placement_levels(trials) if by == "placement" else None)


def _grouping(spec: str, rows: pd.DataFrame) -> str:
    return "placement" if spec == "stage_placement" and rows["placement"].nunique() > 1 else "variant"


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


def adaptivity(rows: pd.DataFrame, trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Whether plain images keep fewer tokens, with the question as the first one's detail: the rank correlation with
    clutter, or with hardness where clutter is not known, for each method at one cost (``rows``: of ``plots.overview``).
    """
    found, what = correlations(rows, images, hardness(trials, images))
    if found.empty or not found["rho"].notna().any():
        return []
    title = question(what)
    more = "more clutter" if what == CLUTTER else "an image is harder for the plain model"
    adapts = found[found["rho"].notna()]
    up = adapts[adapts["clear"] & (adapts["rho"] > 0)]
    down = adapts[adapts["clear"] & (adapts["rho"] < 0)]
    head = (
        f"Of {len(adapts)} methods that let the number of tokens differ, {len(up)} keep more tokens where there is "
        f"{more}, {len(down)} keep fewer, {len(adapts) - len(up) - len(down)} show no clear link (Bonferroni)."
    ).replace("where there is an image", "where an image")
    fixed = len(found) - len(adapts)
    head += f" {fixed} more keep the same number in every image." if fixed else ""
    said = [Finding(head, detail=title, keys=tuple(adapts["key"]), headline=True)]
    for row in adapts.sort_values("rho", ascending=False).itertuples():
        text = f"{row.variant.replace('_', ' ')}: Spearman's rho {row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}]."
        said.append(Finding(text.replace("-0.", "−0."), keys=(row.key,)))
    return said


def limits(setting: Setting, trials: pd.DataFrame) -> list[str]:
    """What this many images can and cannot tell, in plain words."""
    n = setting.images
    known = trials["dense_top1"].dropna()
    accuracy = float(known.iloc[0]) if len(known) else float(trials["top1"].max())
    half = 0.5 * (stats.wilson(accuracy * n, n).high - stats.wilson(accuracy * n, n).low)
    tests = [against_dense(row) for row in trials.to_dict("records")]
    rates = [test.discordance for test in tests if test is not None]
    said = [f"One accuracy near {percent(accuracy)} % is known to ± {percent(half)} points (95 %)."]
    if rates:
        low, high = np.quantile(rates, [0.1, 0.9])
        small, large = (stats.resolution(n, accuracy=accuracy, discordance=float(rate)) for rate in (low, high))
        said.append(
            f"All comparisons here are on the same {n:,} images. A trial and the dense model disagree about "
            f"{percent(float(low))} to {percent(float(high))} % of them, so a difference must be at least "
            f"{percent(small.paired)} to {percent(large.paired)} points to be found in 80 % of repetitions. "
            f"Two results on different images would have to differ by {percent(small.unpaired)} points."
        )
        said.append(f'Smaller differences are reported as "{SAME}": that does not say that they are zero.')
    said.append(
        "Intervals are bootstraps over images and speak of the choice of images only. Where several seeds were run "
        "their standard deviation is given apart; else nothing is said about training or random draws. Best of many "
        "settings means chosen after looking; comparisons with a leader are corrected for their number "
        "(Holm, over all comparisons of an experiment), choices of settings are not."
    )
    return said
