"""Names beside curves instead of in a legend, and axes that end where methods differ."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from analysis import style
from analysis.facts.spec import Facts
from analysis.plots.panels import spread
from analysis.style import Look
from analysis.tables import percent

LINE = 0.15  # inches: a line of a label
COLUMNS = 24  # characters of one
REST = 2.4  # inches of a figure's height that are not its axes
FEW = 4  # names that a legend still tells as quickly


def beside(figure: Figure, axes: Axes, names: list[str], looks: Mapping[str, Look]) -> None:
    """Each curve's name at its right end, in its colour, joined to it where names had to be moved apart. The axes'
    limits must be as they stay.
    """
    ends = {}
    low, high = axes.get_ylim()
    for name in names:
        lines = [line for line in axes.lines if line.get_label() == name]
        bars = [one for one in axes.containers if isinstance(one, ErrorbarContainer) and one.get_label() == name]
        lines += [one.lines[0] for one in bars]
        x = np.concatenate([np.asarray(line.get_xdata(), dtype=float) for line in lines])
        y = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines])
        seen = np.flatnonzero((y >= low) & (y <= high))
        if len(seen):
            last = seen[np.argmax(x[seen])]
            ends[name] = float(x[last]), float(y[last])
    if not ends:
        return
    texts = {name: textwrap.fill(name.replace("_", " "), COLUMNS) for name in ends}
    height = figure.get_figheight() - REST
    rows = max(text.count("\n") + 1 for text in texts.values())
    heights = [(y - low) / (high - low) for _, y in ends.values()]
    least = LINE * (rows + 0.15) / height
    places = spread(heights, least)
    places -= max(0.0, places.max() - 1)  # none above the axes, where their top scale is
    for (name, end), at in zip(ends.items(), places, strict=True):
        colour = style.look_of(name, looks).colour
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            "", end, (1.01, at), xycoords="data", textcoords="axes fraction", annotation_clip=False, arrowprops=arrow
        )
        axes.text(1.015, at, texts[name], transform=axes.transAxes, color=colour, fontsize=8.5, va="center",
                  linespacing=1.0, gid="name")  # fmt: skip


def floor(rows: pd.DataFrame) -> float | None:
    """Where an axis of accuracies (%) ends below, so that few broken trials do not press everything else against the
    top: a little below the lowest tenth; None where nothing lies far below that.
    """
    top1 = 100 * rows["top1"].to_numpy(dtype=float)
    if not len(top1):
        return None
    low, high = float(np.quantile(top1, 0.1, method="higher")), float(top1.max())
    return low - 0.15 * (high - low) if top1.min() < low - 0.5 * (high - low) else None


def seen(facts: Facts) -> list[str]:
    """The series of which anything stands above that, those nearest to the front first."""
    bottom, highest = floor(facts.rows), 100 * facts.rows.groupby("variant", sort=False)["top1"].max()
    return [name for name in facts.lacks if bottom is None or highest[name] >= bottom]


def end_axis(axes: Axes, facts: Facts) -> None:
    bottom = floor(facts.rows)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)


def below(facts: Facts) -> str:
    """What lies below the axis, in words; "" where nothing does."""
    bottom = floor(facts.rows)
    if bottom is None:
        return ""
    out = facts.rows[100 * facts.rows["top1"] < bottom].groupby("variant", sort=False)["top1"].min()
    named = [f"{str(name).replace('_', ' ')} (down to {percent(value)} %)" for name, value in out.items()]
    return f" Below the axis: {', '.join(named)}."
