"""Do methods that adapt to the image keep more tokens where there is more to look at?"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import stats, style
from analysis.facts.tokens import adaptive, clutter_known, correlation, counted_in, tokens_kept
from analysis.frame import records_of
from analysis.style import Look

CAPTION_CLUTTER = (
    "Left: how many images have how many tokens ({counted}), for methods that let the number differ. Right: the mean "
    "number against the known amount of clutter in the image, with 95 % bootstrap intervals; the legend states "
    "Spearman's rank correlation over images with its 95 % interval. Trials nearest to {level}."
)
CAPTION = (
    "How many images have how many tokens ({counted}), for methods that let the number differ from image to image. "
    "Trials nearest to {level}."
)
LINES = 9  # methods that one pair of panels can still show
BINS = 30  # of the histogram, about
WIDER = 6  # tokens by which its bins may be wider, to be fair


@style.themed
def adaptivity(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    *,
    looks: Mapping[str, Look],
    title: str,
    subtitle: str,
) -> Figure:
    """Distribution of tokens over images and, where clutter is known, tokens against clutter; of the first few methods,
    counted alike for all ``trials``.
    """
    counted = counted_in(trials, images)
    rows = adaptive(trials, images).head(LINES)
    cluttered = clutter_known(rows, images)
    figure = style.new_figure(height=4.4)
    panels = figure.subplots(1, 2 if cluttered else 1, squeeze=False)[0]
    counts = [tokens_kept(images[key], counted) for key in rows["key"]]
    bins = fair_bins(counts)
    handles = []
    for row in records_of(rows):
        table, look, name = images[row["key"]], style.look_of(row["variant"], looks), row["variant"]
        tokens = tokens_kept(table, counted)
        sns.histplot(
            x=tokens,
            bins=bins,
            element="step",
            fill=False,
            ax=panels[0],
            color=look.colour,
            linewidth=1.6,
            linestyle=look.dashes,
            label=name,
        )
        entry = style.handle(name, looks)
        if cluttered:
            _against_clutter(panels[1], table.assign(_tokens=tokens), row["variant"], looks)
            rho = correlation(table, counted)
            entry.set_label(f"{style.label(name)}: rho = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]")
        handles.append(entry)
    panels[0].set(xlabel=counted.label, ylabel="images", ylim=(0, None))
    if cluttered:
        panels[1].set(xlabel="clutter (pieces around the object)", ylabel=textwrap.fill(counted.label, 24))
    style.put_title(figure, title, subtitle)
    style.put_legend(figure, handles)
    return style.finish(figure)


def fair_bins(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Edges of the same bins for all: whole numbers of tokens wide, about thirty of them, centred on whole numbers.

    A mean over blocks goes in steps (of 8/12 where 8 of 12 blocks have fewer tokens). Bins are as much wider as it
    takes for each to hold equally many steps: else every other one is high for no reason but its edges.
    """
    low, high = min(map(np.min, counts)), max(map(np.max, counts))
    least = max(1, round((high - low) / BINS))
    steps = [np.diff(values).min() for values in (np.unique(each.round(6)) for each in counts) if len(values) > 1]
    held = {width: [width / step for step in steps] for width in range(least, least + WIDER)}
    fair = (width for width, each in held.items() if np.allclose(each, np.round(each), rtol=0, atol=1e-3))
    width = next(fair, least)
    bins = np.arange(low - 0.5, high + 0.5 + width, width)
    bins[-1] = high + 0.5  # no bin reaches to more tokens than there are
    return bins


def _against_clutter(axes: Axes, table: pd.DataFrame, name: str, looks: Mapping[str, Look]) -> None:
    levels: Iterable[tuple[Any, pd.DataFrame]] = table.groupby("clutter")
    groups = [(float(level), stats.bootstrap(part["_tokens"], draws=1000)) for level, part in levels]
    x, middle = [level for level, _ in groups], [interval.value for _, interval in groups]
    bars = [[i.value - i.low for _, i in groups], [i.high - i.value for _, i in groups]]
    axes.errorbar(x, middle, yerr=bars, elinewidth=1, capsize=2, label=name, **style.look_of(name, looks).line())
