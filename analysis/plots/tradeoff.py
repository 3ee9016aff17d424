"""Accuracy against cost: one curve a series, the dense model as the point of reference. Fits every spec."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from analysis import style
from analysis.matching import dense_gmacs, merge_seeds
from analysis.style import Look

CAPTION = (
    "Top-1 accuracy against multiply-adds as executed, mean over images; bars are 95 % intervals over "
    "images. The star and the dashed line are the same model without any reduction. The upper axis is the "
    "share of its cost."
)


def draw_curves(axes: Axes, trials: pd.DataFrame, *, looks: Mapping[str, Look]) -> list[str]:
    """Draw accuracy against GMACs with the dense reference; returns the series drawn, in order."""
    rows = merge_seeds(trials[~trials["dense"]])
    names = list(dict.fromkeys(rows["variant"]))
    for name in names:
        part = rows[rows["variant"] == name].sort_values("gmacs_mean", kind="stable")
        # A series of several placements is no curve over cost: its points stand alone.
        joined = part["placement"].nunique() < 2
        draw_intervals(axes, part["gmacs_mean"], part, name=name, looks=looks, joined=joined)
    dense_top1 = trials["dense_top1"].dropna()
    if len(dense_top1):
        style.draw_dense(axes, gmacs=dense_gmacs(trials), value=100 * float(dense_top1.iloc[0]))
    axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
    return names


def draw_intervals(
    axes: Axes, x: pd.Series, rows: pd.DataFrame, *, name: str, looks: Mapping[str, Look], joined: bool = True
) -> None:
    """One series of top-1 accuracies with their 95 % intervals as error bars, joined by a line or not."""
    top1 = 100 * rows["top1"]
    # A bound that is missing draws as no bar, and rounding can put a bound a hair on the wrong side.
    bars = np.stack([top1 - 100 * rows["top1_low"], 100 * rows["top1_high"] - top1])
    bars = np.clip(np.nan_to_num(bars), 0, None)
    line = style.look_of(name, looks).line() | ({} if joined else {"linestyle": "none"})
    axes.errorbar(x, top1, yerr=bars, elinewidth=1, capsize=2, label=name, **line)


def share_axis(axes: Axes, trials: pd.DataFrame) -> None:
    """A second scale on top: cost as a share of the dense model's."""
    dense = dense_gmacs(trials)

    def to_share(gmacs: ArrayLike) -> NDArray[np.float64]:
        return 100 * np.asarray(gmacs, dtype=float) / dense

    def to_gmacs(share: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(share, dtype=float) * dense / 100

    top = axes.secondary_xaxis("top", functions=(to_share, to_gmacs))
    top.set_xlabel("share of the dense model's cost (%)", fontsize="small")
    top.tick_params(labelsize="small", length=3)
    top.spines["top"].set_visible(False)


@style.themed
def tradeoff(trials: pd.DataFrame, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """Top-1 accuracy against GMACs for the finished trials of one spec."""
    figure = style.new_figure()
    axes = figure.subplots()
    names = draw_curves(axes, trials, looks=looks)
    share_axis(axes, trials)
    style.put_title(figure, title, subtitle)
    handles = [style.handle(name, looks) for name in names]
    style.put_legend(figure, [*handles, style.dense_handle()] if trials["dense_top1"].notna().any() else handles)
    return style.finish(figure)
