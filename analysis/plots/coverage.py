"""Do the surviving patches cover the object? Possible only where the object's mask is known."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis import stats, style
from analysis.matching import merge_seeds
from analysis.plots.tradeoff import share_axis
from analysis.style import Look

CAPTION = (
    "Share of the patches on the object that still have a token of their own after the last block, mean over "
    "images with 95 % bootstrap intervals, against multiply-adds as executed. A merged group counts for its "
    "heaviest member only, so merging methods keep more information about the object than their curve shows."
)


@style.themed
def coverage(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    *,
    looks: Mapping[str, Look],
    title: str,
    subtitle: str,
) -> Figure:
    """Coverage of the object's mask against GMACs, one curve a series."""
    rows = merge_seeds(trials[~trials["dense"] & trials["coverage"].notna()])
    figure = style.new_figure()
    axes = figure.subplots()
    names = list(dict.fromkeys(rows["variant"]))
    for name in names:
        part = rows[rows["variant"] == name].sort_values("gmacs_mean", kind="stable")
        value = 100 * part["coverage"]
        spread = [_half_widths(key, images) for key in part["key"]]
        axes.errorbar(
            part["gmacs_mean"],
            value,
            yerr=list(zip(*spread, strict=True)),
            elinewidth=1,
            capsize=2,
            label=name,
            **style.look_of(name, looks).line(),
        )
    axes.set(xlabel=style.GMACS, ylabel="object's patches that survive (%)", ylim=(0, 104))
    share_axis(axes, trials)
    style.put_title(figure, title, subtitle)
    style.put_legend(figure, [style.handle(name, looks) for name in names])
    return style.finish(figure)


def _half_widths(key: str, images: Mapping[str, pd.DataFrame]) -> tuple[float, float]:
    """Points below and above the mean; 0 where the per-image table is missing."""
    if key not in images or "coverage" not in images[key]:
        return 0.0, 0.0
    known = images[key]["coverage"].dropna()
    if known.empty:
        return 0.0, 0.0
    interval = stats.bootstrap(known, draws=1000)
    return 100 * (interval.value - interval.low), 100 * (interval.high - interval.value)
