"""One stage or many (Figure 4c of the ATS paper): accuracy against cost, with the saving the paper claims."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.matching import dense_cost
from analysis.plots.tradeoff import draw_curves, legend, share_axis
from analysis.style import Look

SAVED = 0.37  # of DeiT-S's GFLOPs "while accuracy is almost kept" (ATS, Figure 4)
CAPTION = (
    "Top-1 accuracy against multiply-adds as executed, with 95 % intervals over images. The dotted line is the cost at "
    "which the ATS paper keeps almost all of DeiT-S's accuracy: 37 % below the dense model (finetuned, multi-stage)."
)


@style.themed
def single_multi(trials: pd.DataFrame, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """Accuracy against GMACs with the published saving marked."""
    figure = style.new_figure()
    axes = figure.subplots()
    names = draw_curves(axes, trials, looks=looks)
    axes.axvline((1 - SAVED) * dense_cost(trials), color="#555555", linestyle=":", linewidth=1.4, gid="published")
    share_axis(axes, trials)
    style.put_title(figure, title, subtitle)
    line = Line2D([], [], color="#555555", linestyle=":", linewidth=1.4, label="37 % saved (published)")
    style.put_legend(figure, [*legend(names, looks, trials), line])
    return style.finish(figure)
