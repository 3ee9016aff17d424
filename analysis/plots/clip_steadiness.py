"""How steady in time the kept patches are: do neighbouring frames keep the same places?"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.frame import rows_of
from analysis.style import Look

CAPTION = (
    "Places that two neighbouring frames both keep after the last block, as a share of those that either keeps "
    "(Jaccard), mean over pairs of frames with 95 % intervals of resampled clips. The bar across is what blind choices "
    "of as many places would have: right of it a method keeps to its places, at it every frame is chosen anew. What "
    "moves should be followed, so the steadiest is not the best. {level}."
)


@style.themed
def clip_steadiness(found: pd.DataFrame, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """A line a method: its mean Jaccard with its interval, and that of blind choices."""
    rows = found.sort_values("jaccard", kind="stable")
    figure = style.new_figure(height=max(2.6, 1.7 + 0.27 * len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows_of(rows)):
        look = style.look_of(row.variant, looks)
        axes.plot([row.low, row.high], [place, place], color=look.colour, linewidth=1.8, gid="interval")
        axes.plot([row.jaccard], [place], marker=look.marker, markersize=7, linestyle="none", color=look.colour)
        axes.plot([row.chance], [place], marker="|", markersize=13, markeredgewidth=2, linestyle="none",
                  color=style.DENSE_COLOUR, gid="chance")  # fmt: skip
    axes.set_yticks(range(len(rows)), [style.label(name) for name in rows["variant"]], fontsize=9)
    axes.set(ylim=(-0.7, len(rows) - 0.3), xlim=(0, 1.03), xlabel="places kept in two neighbouring frames (Jaccard)")
    style.put_title(figure, title, subtitle)
    grey = {"linestyle": "none", "markersize": 7}
    style.put_legend(
        figure,
        [
            Line2D([], [], marker="o", color=style.GREY, label="method", **grey),  # type: ignore[arg-type]
            Line2D([], [], color=style.GREY, linewidth=1.8, label="95 % interval over clips"),
            Line2D([], [], marker="|", markeredgewidth=2, color=style.DENSE_COLOUR, label="blind choices of as many",
                   **{**grey, "markersize": 11}),  # type: ignore[arg-type]
        ],
    )  # fmt: skip
    return style.finish(figure)
