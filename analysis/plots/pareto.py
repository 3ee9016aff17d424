"""All methods: which one to take at which cost. Bands, and the line that nothing measured lies above."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.facts.matching import dense_gmacs
from analysis.facts.spec import Facts
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_reference, share_axis

CAPTION = (
    "Every trial of every method (grey), and the Pareto front: trials that no cheaper one equals. The methods on the "
    "front are drawn in full, with their 95 % bands over images; the thick grey line is the front. It was chosen after "
    "looking, so its height is a little flattering: whether neighbours can be told apart is in the comparison."
)


@style.themed
def pareto(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against GMACs: all points, the front, and the methods on it, labelled where they stand."""
    rows, edge, looks = facts.rows, facts.front, scene.looks
    figure = style.new_figure(height=5.2)
    axes = figure.subplots()
    axes.plot(rows["gmacs_mean"], 100 * rows["top1"], linestyle="none", marker=".", color="#bdbdbd", gid="all")
    style.settle(axes, rows["gmacs_mean"], 100 * rows["top1"], map(style.setting, rows.to_dict("records")))
    axes.step(
        [*edge["gmacs_mean"], max(dense_gmacs(facts.trials), float(rows["gmacs_mean"].max()))],
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
    draw_reference(axes, facts)
    axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
    _zoom(axes, rows)
    share_axis(axes, facts)
    style.put_title(figure, title, scene.subtitle)
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


PLOT = Plot(
    pareto,
    "{title}: the Pareto front",
    lambda facts, scene: CAPTION,
    suffix="_pareto",
    needs=lambda facts: len(facts.series) > 1,
)
