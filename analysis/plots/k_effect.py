"""The effect of K (Figure A.1 of the ATS paper): accuracy and cost against the number of sample points or
kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.matching import dense_cost, merge_seeds
from analysis.plots.tradeoff import draw_intervals, legend
from analysis.style import Look

CAPTION = (
    "The same K buys different things: top-K always keeps K patches, ATS draws K points and keeps each "
    "patch hit once, so K only bounds its cost from above. Left: top-1 accuracy with 95 % intervals. "
    "Right: the cost reached, mean over images; the band is one standard deviation over images."
)


@style.themed
def k_effect(trials: pd.DataFrame, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """Top-1 accuracy and GMACs against K (column ``x``), one curve a series."""
    rows = merge_seeds(trials[~trials["dense"] & trials["x"].notna()])
    figure = style.new_figure(height=4.2)
    accuracy, cost = figure.subplots(1, 2)
    names = list(dict.fromkeys(rows["variant"]))
    for name in names:
        part = rows[rows["variant"] == name].sort_values("x", kind="stable")
        draw_intervals(accuracy, part["x"], part, name=name, looks=looks)
        look = style.look_of(name, looks)
        cost.plot(part["x"], part["gmacs_mean"], label=name, **look.line())
        spread = part["gmacs_std"].fillna(0)
        cost.fill_between(
            part["x"],
            part["gmacs_mean"] - spread,
            part["gmacs_mean"] + spread,
            color=look.colour,
            alpha=0.15,
            linewidth=0,
        )
    dense_top1 = trials["dense_top1"].dropna()
    if len(dense_top1):
        style.draw_dense(accuracy, gmacs=None, value=100 * float(dense_top1.iloc[0]))
        style.draw_dense(cost, gmacs=None, value=dense_cost(trials))
    accuracy.set(xlabel="K (sample points or kept patches)", ylabel=style.TOP1)
    cost.set(xlabel="K (sample points or kept patches)", ylabel=style.GMACS)
    style.put_title(figure, title, subtitle)
    handles = [*legend(names, looks, trials, star=False)]
    spread_drawn = bool((rows["gmacs_std"].fillna(0) > 0).any())
    band = [style.band_handle("± 1 standard deviation of cost")] if spread_drawn else []
    style.put_legend(figure, [*handles, *band])
    return style.finish(figure)
