"""What is said of all specs of a setting together: whether methods adapt to the image, and what so many images can
tell.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis import stats
from analysis.facts.matching import against_dense
from analysis.facts.overview import Overview
from analysis.facts.tokens import CLUTTER
from analysis.frame import Setting, records_of, rows_of
from analysis.plots.clutter import question
from analysis.tables import percent
from analysis.words import SAME, Finding


def adaptivity(facts: Overview) -> list[Finding]:
    """Whether plain images keep fewer tokens, with the question as the first one's detail: the rank correlation with
    clutter, or with hardness where clutter is not known, for each method at one cost.
    """
    found, what = facts.correlations
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
    for row in rows_of(adapts.sort_values("rho", ascending=False)):
        text = f"{row.variant.replace('_', ' ')}: Spearman's rho {row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}]."
        said.append(Finding(text.replace("-0.", "−0."), keys=(row.key,)))
    return said


def limits(setting: Setting, trials: pd.DataFrame) -> list[str]:
    """What this many images can and cannot tell, in plain words."""
    n = setting.images
    known = trials["dense_top1"].dropna()
    accuracy = float(known.iloc[0]) if len(known) else float(trials["top1"].max())
    half = 0.5 * (stats.wilson(accuracy * n, n).high - stats.wilson(accuracy * n, n).low)
    tests = [against_dense(row) for row in records_of(trials)]
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
