"""The published table (Table 1 of the ATS paper) as points, with what was measured here marked beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import published, style
from analysis.facts.matching import against_dense
from analysis.facts.spec import Facts
from analysis.frame import records_of, rows_of
from analysis.plots import panels
from analysis.plots.base import Plot, Scene

CAPTION = (
    "{left} pair of a model and the same model with ATS, as printed (Table 1; finetuned; ImageNet-1k, 50,000 "
    "images): what it saves and what it costs in points of top-1, labelled; and, filled, the Pareto front of what was "
    "measured here ({what}), with paired 95 % intervals. {differs}"
)
LEFT = (
    "Left: every model of Table 1 (grey: dense, coloured: with token reduction, arrows from a model to itself with "
    "ATS), and ours as a filled star (dense) and circles (reduced). Right: each"
)


def table_one() -> pd.DataFrame:
    """Table 1 as printed."""
    rows = published.load()
    found = rows[rows["source"].str.startswith("ATS") & (rows["table"] == "Table 1")]
    return found[found["gflops"].notna() & found["top1"].notna()].reset_index(drop=True)


def printed_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Each model with ATS beside itself: model, resolution, gflops, top1, dense_gflops, dense_top1."""
    dense = rows[rows["method"].isna()][["model", "resolution", "gflops", "top1"]]
    with_ats = rows[rows["method"] == "ATS"][["model", "resolution", "gflops", "top1"]]
    found = with_ats.merge(dense, on=["model", "resolution"], suffixes=("", "_dense"))
    return found.rename(columns={"gflops_dense": "dense_gflops", "top1_dense": "dense_top1"})


@style.themed
def published_points(facts: Facts, scene: Scene, title: str) -> Figure:
    """Printed points in absolute numbers (where ours are on the same data) and relative to the dense model."""
    rows, same_data = table_one(), scene.imagenet
    figure = style.new_figure(height=4.8)
    axes = figure.subplots(1, 2 if same_data else 1, squeeze=False)[0]
    if same_data:
        _absolute(axes[0], rows, facts)
    _relative(axes[-1], printed_pairs(rows), facts)
    style.put_title(figure, title, scene.subtitle)
    star: dict[str, Any] = {"marker": "o", "linestyle": "none"}
    handles = [
        Line2D([], [], label="published: with ATS", markerfacecolor="white", markeredgecolor="#a33b00", **star),
        Line2D([], [], label="measured here: Pareto front", color="#0a5c8f", **star),
    ]
    if same_data:
        handles.insert(0, Line2D([], [], label="published: dense, other reductions", color="#b5b5b5", **star))
        handles.append(Line2D([], [], label="measured here: dense", color="#0a5c8f", marker="*", markersize=12,
                              linestyle="none"))  # fmt: skip
    style.put_legend(figure, handles)
    return style.finish(figure)


def _absolute(axes: Axes, rows: pd.DataFrame, facts: Facts) -> None:
    ours = facts.front
    plain, ats = rows[rows["method"] != "ATS"], rows[rows["method"] == "ATS"]
    axes.plot(plain["gflops"], plain["top1"], "o", color="#b5b5b5", markersize=4.5, gid="published")
    for pair in rows_of(printed_pairs(rows)):
        axes.annotate("", (pair.gflops, pair.top1), (pair.dense_gflops, pair.dense_top1),
                      arrowprops={"arrowstyle": "->", "color": "#a33b00", "linewidth": 0.9})  # fmt: skip
    axes.plot(ats["gflops"], ats["top1"], "o", markerfacecolor="white", markeredgecolor="#a33b00", gid="published-ats")
    axes.plot(ours["gmacs_mean"], 100 * ours["top1"], "o-", color="#0a5c8f", markersize=5, linewidth=1, gid="ours")
    if not np.isnan(facts.dense_top1):
        axes.plot([facts.dense], [100 * facts.dense_top1], "*", color="#0a5c8f", markersize=13, gid="ours-dense")
    axes.set_xscale("log")
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20) if 0.7 * float(ours["gmacs_mean"].min()) <= t <= 30]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
    low = min(float(rows["top1"].min()), max(60.0, 100 * float(ours["top1"].min())))
    axes.set_ylim(bottom=low - 2)


def _relative(axes: Axes, pairs: pd.DataFrame, facts: Facts) -> None:
    pairs = pairs.assign(
        saved=100 * (1 - pairs["gflops"] / pairs["dense_gflops"]), change=pairs["top1"] - pairs["dense_top1"]
    ).sort_values("change", kind="stable")
    axes.plot(
        pairs["saved"], pairs["change"], "o", markerfacecolor="white", markeredgecolor="#a33b00", gid="published-ats"
    )
    dense = facts.dense
    x, y, low, high = [], [], [], []
    for row in records_of(facts.front):
        test = against_dense(row)
        change = test.difference if test else row["top1"] - row["dense_top1"]
        x.append(100 * (1 - row["gmacs_mean"] / dense))
        y.append(100 * change)
        low.append(max(0.0, 100 * (change - test.low)) if test else np.nan)
        high.append(max(0.0, 100 * (test.high - change)) if test else np.nan)
    axes.errorbar(x, y, yerr=[low, high], fmt="o-", color="#0a5c8f", markersize=5, linewidth=1, elinewidth=1, capsize=2,
                  label="ours")  # fmt: skip
    axes.axhline(0, color=style.DENSE_COLOUR, linewidth=1)
    bottom = max(min(y, default=-1.0), -12.0) - 1
    axes.set(xlabel="GMACs saved (%)", ylabel="change in top-1 (points)")
    axes.set_ylim(bottom, 0.55 * abs(bottom))
    axes.set_xlim(left=min(0.0, *x) - 2 if x else 0)
    # The printed pairs lie on two lines of height: their names go above, spread over the width, each with a leader.
    names = pairs.sort_values("saved", kind="stable")
    left, right = axes.get_xlim()
    places = panels.spread([(value - left) / (right - left) for value in names["saved"]], 0.085)
    places = places - max(0.0, places[-1] - 0.97) if len(places) else places
    for place, row in zip(places, rows_of(names), strict=True):
        text = f"{row.model}{f' {row.resolution:g}' if row.resolution != 224 else ''}"
        axes.annotate(
            "",
            (row.saved, row.change),
            (place, 0.8),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "#c9885f", "linewidth": 0.6, "shrinkA": 0},
        )
        axes.text(place, 0.81, text, transform=axes.transAxes, rotation=90, fontsize=7.5, ha="center", va="bottom")


def caption(facts: Facts, scene: Scene) -> str:
    what = f"{published.model_name(scene.model)}, {scene.count:,} images"
    tuned, same_data = set(facts.trials["finetuned"]), scene.imagenet
    differs = "Ours are off the shelf, not finetuned" if tuned == {False} else "Ours include finetuned trials"
    differs += "." if same_data else ", and on other data than ImageNet: only the change is set beside print."
    return CAPTION.format(left=LEFT if same_data else "Each", what=what, differs=differs)


PLOT = Plot(
    published_points,
    "Table 1 of the ATS paper, and ours beside it",
    caption,
    suffix="_published",
    needs=lambda facts: not facts.rows.empty and not np.isnan(facts.dense_top1),
)
