"""All methods: which one to take at which cost. Bands, and the line that nothing measured lies above."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.matching import dense_gmacs, merge_seeds
from analysis.plots.tradeoff import draw_reference, share_axis
from analysis.style import Look

CAPTION = (
    "Every trial of every method (grey), and the Pareto front: trials that no cheaper one equals. The methods on the "
    "front are drawn in full, with their 95 % bands over images; the thick grey line is the front. It was chosen after "
    "looking, so its height is a little flattering: whether neighbours can be told apart is in the comparison."
)


def front(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that no row of at most their cost equals or exceeds in accuracy, cheapest first."""
    ranked = rows.sort_values(["gmacs_mean", "top1"], ascending=[True, False], kind="stable")
    best = ranked["top1"].cummax().shift(fill_value=-np.inf)
    return ranked[ranked["top1"] > best]


@style.themed
def pareto(trials: pd.DataFrame, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """Accuracy against GMACs: all points, the front, and the methods on it, labelled where they stand."""
    rows = merge_seeds(trials[~trials["dense"]])
    edge = front(rows)
    figure = style.new_figure(height=5.2)
    axes = figure.subplots()
    axes.plot(rows["gmacs_mean"], 100 * rows["top1"], linestyle="none", marker=".", color="#bdbdbd", gid="all")
    axes.step(
        [*edge["gmacs_mean"], max(dense_gmacs(trials), float(rows["gmacs_mean"].max()))],
        [*(100 * edge["top1"]), 100 * float(edge["top1"].iloc[-1])],
        where="post",
        color="#9a9a9a",
        linewidth=4,
        alpha=0.45,
        zorder=1.2,
        gid="front",
    )
    names = list(dict.fromkeys(edge["variant"]))
    for name in names:
        part = rows[rows["variant"] == name].sort_values("gmacs_mean", kind="stable")
        look = style.look_of(name, looks)
        bounds = 100 * part["top1_low"], 100 * part["top1_high"]
        axes.fill_between(part["gmacs_mean"], *bounds, color=look.colour, alpha=0.16, linewidth=0, label="_band")
        axes.plot(part["gmacs_mean"], 100 * part["top1"], label=name, **look.line())
    draw_reference(axes, trials)
    axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
    _zoom(axes, rows)
    share_axis(axes, trials)
    style.put_title(figure, title, subtitle)
    others = Line2D([], [], linestyle="none", marker=".", color="#bdbdbd", label="other trials")
    line = Line2D([], [], color="#9a9a9a", linewidth=4, alpha=0.45, label="front")
    band = style.band_handle("95 % interval over images")
    series = [style.handle(name, looks) for name in names]
    style.put_legend(figure, [*series, band, line, others, style.dense_handle()])
    return style.finish(figure)


def _zoom(axes: Axes, rows: pd.DataFrame) -> None:
    """Few broken trials must not press everything else against the top: the axis ends below the lowest tenth."""
    top1 = 100 * rows["top1"].to_numpy()
    low, high = float(np.quantile(top1, 0.1)), float(top1.max())
    if top1.min() < low - 0.5 * (high - low):
        axes.set_ylim(bottom=low - 0.15 * (high - low))
