"""Do plain images keep fewer tokens? The rank correlation of tokens with clutter for every method, tested, not
illustrated. Where clutter is not known (photographs), with how hard the plain model finds an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.facts.tokens import CLUTTER, LAST, MEAN
from analysis.frame import rows_of
from analysis.style import Look

CAPTION = (
    "Spearman's rank correlation over images of {counted} with {what}, with 95 % intervals (Bonett and Wright), for "
    "every method that lets the number differ. Right of zero: {more} images keep fewer tokens. Filled: the interval "
    "excludes zero after Bonferroni's correction; hollow: it does not. {level}.{fixed}"
)


def caption(found: pd.DataFrame, what: str, level: str) -> str:
    fixed = [name.replace("_", " ") for name in found.loc[found["rho"].isna(), "variant"]]
    text = f" The same number in every image, hence no correlation: {', '.join(fixed)}." if fixed else ""
    more = "plainer" if what == CLUTTER else "easier"
    return CAPTION.format(what=what, counted=found["counted"].iloc[0], level=level, fixed=text, more=more)


def question(what: str) -> str:
    """What the correlation answers: loss is no measure of how plain an image is."""
    return "Do plain images keep fewer tokens?" if what == CLUTTER else "Do easy images keep fewer tokens?"


@style.themed
def clutter(found: pd.DataFrame, what: str, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """A forest plot: one line a method, strongest correlation on top."""
    rows = found[found["rho"].notna()].sort_values("rho", kind="stable")
    figure = style.new_figure(height=max(2.6, 1.7 + 0.27 * len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows_of(rows)):
        look = style.look_of(row.variant, looks)
        axes.plot([row.low, row.high], [place, place], color=look.colour, linewidth=1.8, gid="interval")
        face = look.colour if row.clear else "white"
        axes.plot([row.rho], [place], marker=look.marker, markersize=7, linestyle="none", markeredgecolor=look.colour,
                  markerfacecolor=face, label=row.variant)  # fmt: skip
    axes.axvline(0, color=style.DENSE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(rows)), [style.label(name) for name in rows["variant"]], fontsize=9)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    bound = min(1.0, 1.08 * float(np.nanmax(np.abs(rows[["low", "high"]].to_numpy()))))
    axes.set_xlim(min(-0.15, -bound if rows["low"].min() < -0.15 else -0.15), max(0.15, bound))
    words = "clutter" if what == CLUTTER else "the plain model's loss"
    tokens = next(one.label for one in (LAST, MEAN) if one.words == found["counted"].iloc[0])
    axes.set_xlabel(f"rank correlation (Spearman's rho) of\n{tokens}, with {words}")
    style.put_title(figure, title, subtitle)
    common: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": style.GREY, "markersize": 6}
    signs = [(rows["clear"].any(), "interval excludes 0 (Bonferroni)", style.GREY),
             ((~rows["clear"]).any(), "it does not", "white")]  # fmt: skip
    handles = [Line2D([], [], label=text, **common, markerfacecolor=face) for drawn, text, face in signs if drawn]
    handles.append(Line2D([], [], color=style.GREY, linewidth=1.8, label="95 % interval over images"))
    style.put_legend(figure, handles)
    return style.finish(figure)
