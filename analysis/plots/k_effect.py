"""The effect of K (Figure A.1 of the ATS paper): accuracy and cost against the number of sample points or
kept tokens.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis import style
from analysis.facts.spec import Facts
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_intervals, legend

CAPTION = (
    "The same K buys different things: top-K always keeps K patches, ATS draws K points and keeps each "
    "patch hit once, so K only bounds its cost from above. Left: top-1 accuracy with 95 % intervals. "
    "Right: the cost reached, mean over images; the band is one standard deviation over images."
)


@style.themed
def k_effect(facts: Facts, scene: Scene, title: str) -> Figure:
    """Top-1 accuracy and GMACs against K (column ``x``), one curve a series."""
    rows, looks = facts.rows[facts.rows["x"].notna()], scene.looks
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
    if not np.isnan(facts.dense_top1):
        style.draw_dense(accuracy, gmacs=None, value=100 * facts.dense_top1)
        style.draw_dense(cost, gmacs=None, value=facts.dense)
    accuracy.set(xlabel="K (sample points or kept patches)", ylabel=style.TOP1)
    cost.set(xlabel="K (sample points or kept patches)", ylabel=style.GMACS)
    style.put_title(figure, title, scene.subtitle)
    handles = [*legend(names, looks, facts, star=False)]
    spread_drawn = bool((rows["gmacs_std"].fillna(0) > 0).any())
    band = [style.band_handle("± 1 standard deviation of cost")] if spread_drawn else []
    style.put_legend(figure, [*handles, *band])
    return style.finish(figure)


def counts(facts: Facts) -> bool:
    """Whether ``x`` counts tokens: a share is no K."""
    given = facts.rows["x"].dropna()
    return given.nunique() > 1 and bool((given % 1 == 0).all() and (given >= 1).all())


PLOT = Plot(
    k_effect, "{title}: accuracy and cost against K", lambda facts, scene: CAPTION, suffix="_effect", needs=counts
)
