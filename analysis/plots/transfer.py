"""One training, many budgets: a model finetuned at one budget and evaluated at others without retraining."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.facts.spec import Facts
from analysis.facts.transfer import PLAIN
from analysis.frame import records_of
from analysis.plots import tradeoff
from analysis.plots.base import Plot, Scene

CAPTION = (
    "Top-1 accuracy against the multiply-adds of evaluation, one curve for each budget the model was finetuned at, and "
    "in grey without finetuning; a panel a method. Large rings: evaluated at the budget it was trained for. A curve "
    "that stays beside the rings of the others was trained once for all of them. Bars are 95 % intervals over images, "
    "small circles single training seeds."
)


@style.themed
def transfer(facts: Facts, scene: Scene, title: str) -> Figure:
    """A panel a method: accuracy against cost for each budget of training."""
    rows = facts.trainings
    methods = list(dict.fromkeys(rows["method"]))
    kinds = [kind for kind in dict.fromkeys(rows["trained"]) if kind != PLAIN]
    looks = {kind: style.look(slot) for slot, kind in enumerate(kinds)}
    figure = style.new_figure(height=4.5 if len(methods) < 3 else 7.2)
    columns = min(2, len(methods))
    grid = figure.subplots(-(-len(methods) // columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes in list(grid.flat)[len(methods) :]:
        axes.remove()
    for axes, method in zip(grid.flat, methods, strict=False):
        for kind, part in rows[rows["method"] == method].groupby("trained", sort=False):
            part = part.sort_values("gmacs_mean", kind="stable")
            line = looks[kind].line() if kind in looks else {"color": "#8d8d8d", "marker": "x", "linestyle": ":"}
            top1 = 100 * part["top1"]
            bars = np.clip([top1 - 100 * part["top1_low"], 100 * part["top1_high"] - top1], 0, None)
            axes.errorbar(part["gmacs_mean"], top1, yerr=bars, elinewidth=1, capsize=2, label=str(kind), **line)
            style.settle(axes, part["gmacs_mean"], top1, map(style.setting, records_of(part)))
            tradeoff.draw_seeds(axes, part["gmacs_mean"], part, colour=line["color"])
            home = part[part["home"]]
            ring: dict[str, Any] = {
                "linestyle": "none",
                "marker": "o",
                "markersize": 13,
                "markerfacecolor": "none",
                "gid": "home",
            }
            ring |= {"markeredgecolor": line["color"], "markeredgewidth": 1.4}
            axes.plot(home["gmacs_mean"], 100 * home["top1"], **ring)
        tradeoff.draw_reference(axes, facts, at_cost=False)
        axes.set_title(method)
        axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
        axes.label_outer()
    style.put_title(figure, title, scene.subtitle)
    handles = [style.handle(kind, looks) for kind in kinds]
    for handle, kind in zip(handles, kinds, strict=True):
        handle.set_label(f"finetuned at {kind}")
    if PLAIN in set(rows["trained"]):
        handles.append(style.plain_handle(PLAIN))
    home_handle = Line2D([], [], linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=style.GREY)
    home_handle.set_label("evaluated at the budget of its training")
    handles += [home_handle, style.interval_handle(), *([style.seeds_handle()] if (rows["seeds"] > 1).any() else [])]
    style.put_legend(figure, [*handles, style.dense_handle(star=False)])
    return style.finish(figure)


PLOT = Plot(
    transfer,
    "{title}: finetuned at one budget, evaluated at others",
    lambda facts, scene: CAPTION,
    otherwise=tradeoff.PLOT,
)
