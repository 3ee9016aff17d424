"""Do frames in which more moves keep more tokens? The rank correlation for every method, over frames of all clips."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.frame import rows_of
from analysis.style import Look

CAPTION = (
    "Spearman's rank correlation of the patches of a frame that leave the last block with how much changes in it from "
    "the frame before (mean difference of pixels), with 95 % intervals of resampled clips, for every method that lets "
    "the number differ. Filled: over all frames of all clips, so that busy clips count as well; hollow: within clips, "
    "after the means of each clip are taken off both. Right of zero: frames in which more moves keep more tokens. "
    "{level}.{fixed}"
)


def caption(found: pd.DataFrame, level: str) -> str:
    fixed = [str(name).replace("_", " ") for name in found.loc[found["rho"].isna(), "variant"]]
    text = f" As many in every frame of every clip, hence no correlation: {', '.join(fixed)}." if fixed else ""
    return CAPTION.format(level=level, fixed=text)


@style.themed
def clip_motion(found: pd.DataFrame, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """A forest plot: one line a method, strongest correlation on top."""
    rows = found[found["rho"].notna()].sort_values("rho", kind="stable")
    figure = style.new_figure(height=max(2.8, 1.9 + 0.32 * len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows_of(rows)):
        look = style.look_of(row.variant, looks)
        for value, low, high, face, up in (
            (row.rho, row.low, row.high, look.colour, 0.13),
            (row.within, row.within_low, row.within_high, "white", -0.13),
        ):
            if np.isnan(value):
                continue
            axes.plot([low, high], [place + up] * 2, color=look.colour, linewidth=1.8, gid="interval")
            axes.plot([value], [place + up], marker=look.marker, markersize=7, linestyle="none",
                      markeredgecolor=look.colour, markerfacecolor=face)  # fmt: skip
    axes.axvline(0, color=style.DENSE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(rows)), [style.label(name) for name in rows["variant"]], fontsize=9)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    ends = rows[["low", "high", "within_low", "within_high"]].to_numpy(dtype=float)
    axes.set_xlim(min(-0.15, 1.08 * float(np.nanmin(ends))), max(0.15, 1.08 * float(np.nanmax(ends))))
    axes.set_xlabel("rank correlation (Spearman's rho) of\npatches kept in a frame, with motion in it")
    style.put_title(figure, title, subtitle)
    common = {"linestyle": "none", "marker": "o", "color": style.GREY, "markersize": 6}
    handles = [
        Line2D([], [], label=text, markerfacecolor=face, **common)  # type: ignore[arg-type]
        for text, face in (("over all frames of all clips", style.GREY), ("within clips", "white"))
    ]
    handles.append(Line2D([], [], color=style.GREY, linewidth=1.8, label="95 % interval over clips"))
    style.put_legend(figure, handles)
    return style.finish(figure)
