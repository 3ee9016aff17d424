"""What training with the reduction in place gives back (Figure 4b, Table A.3 of the ATS paper)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.facts.recovery import base
from analysis.facts.spec import Facts
from analysis.frame import records_of
from analysis.plots import tradeoff
from analysis.plots.base import Plot, Scene

CAPTION = (
    "Left: top-1 accuracy against multiply-adds as executed; filled and solid: finetuned with the reduction in place, "
    "hollow and dashed: the same off the shelf. Bars are 95 % intervals over images; small circles are single training "
    "seeds, the mean of which is drawn: the spread between seeds is another source than the images and is not in the "
    "bars. Right: what finetuning changes at the same setting, in points, with paired 95 % intervals over the same "
    "images."
)


@style.themed
def finetuning(facts: Facts, scene: Scene, title: str) -> Figure:
    """Finetuned against off the shelf, and the change."""
    found, rows, looks = facts.recovered, facts.rows, scene.looks
    figure = style.new_figure(height=4.6)
    axes = figure.subplots(1, 2 if found else 1, squeeze=False)[0]
    names = list(dict.fromkeys(base(name) for name in rows["variant"]))
    own = {name: style.look_of(next(v for v in rows["variant"] if base(v) == name), looks) for name in names}
    for (variant, tuned), part in rows.groupby(["variant", "finetuned"], sort=False):
        part = part.sort_values("gmacs_mean", kind="stable")
        look, top1 = own[base(str(variant))], 100 * part["top1"]
        bars = np.clip([top1 - 100 * part["top1_low"], 100 * part["top1_high"] - top1], 0, None)
        line = look.line() | {"label": str(variant), "linestyle": "-" if tuned else (0, (4, 2))}
        line |= {} if tuned else {"markerfacecolor": "white", "markeredgecolor": look.colour}
        axes[0].errorbar(part["gmacs_mean"], top1, yerr=bars, elinewidth=1, capsize=2, **line)
        style.settle(axes[0], part["gmacs_mean"], top1, map(style.setting, records_of(part)))
        tradeoff.draw_seeds(axes[0], part["gmacs_mean"], part, colour=look.colour)
    tradeoff.draw_reference(axes[0], facts)
    _draw_tuned_dense(axes[0], facts)
    axes[0].set(xlabel=style.GMACS, ylabel=style.TOP1)
    if found:
        for name in names:
            own_pairs = sorted((one for one in found if one.name == name), key=lambda one: one.gmacs)
            y = np.array([100 * one.paired.difference for one in own_pairs])
            low, high = ([100 * getattr(one.paired, end) for one in own_pairs] for end in ("low", "high"))
            spans = np.clip([y - low, high - y], 0, None)
            axes[1].errorbar([one.gmacs for one in own_pairs], y, yerr=spans, elinewidth=1, capsize=2,
                             label=name, **own[name].line())  # fmt: skip
        axes[1].axhline(0, color=style.DENSE_COLOUR, linewidth=1)
        axes[1].set(xlabel=style.GMACS, ylabel="finetuned − off the shelf (points)")
    style.put_title(figure, title, scene.subtitle)
    grey: dict[str, Any] = {"color": "#6a6a6a", "marker": "o", "markersize": 6}
    kinds = [Line2D([], [], label="finetuned", **grey),
             Line2D([], [], label="off the shelf", linestyle=(0, (4, 2)), markerfacecolor="white", **grey)]  # fmt: skip
    seeds = [style.seeds_handle()] if (rows["seeds"] > 1).any() else []
    series = [style.handle(name, own) for name in names]
    tuned_dense = [Line2D([], [], label="dense model, finetuned", **TUNED_DENSE)] if len(_tuned_dense(facts)) else []
    style.put_legend(figure, [*series, *kinds, style.interval_handle(), *seeds, style.dense_handle(), *tuned_dense])
    return style.finish(figure)


TUNED_DENSE: dict[str, Any] = {
    "marker": "*",
    "markersize": 14,
    "linestyle": "none",
    "markerfacecolor": "white",
    "markeredgecolor": style.DENSE_COLOUR,
}


def _tuned_dense(facts: Facts) -> pd.DataFrame:
    return facts.trials[facts.trials["dense"] & facts.trials["finetuned"]]


def _draw_tuned_dense(axes: Axes, facts: Facts) -> None:
    """The plain model finetuned by the same recipe, where it was run: the fair upper end."""
    dense = _tuned_dense(facts)
    if len(dense):
        axes.plot([facts.dense], [100 * float(dense["top1"].mean())], gid="tuned-dense", **TUNED_DENSE)


PLOT = Plot(finetuning, "{title}: finetuned and off the shelf", lambda facts, scene: CAPTION, otherwise=tradeoff.PLOT)
