"""Small multiples: a panel for each series where one pair of axes could not tell so many apart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style

TOO_MANY = 9  # series that one pair of axes can still show, and panels that one figure can
COLUMNS = 3
MORE = " At most nine panels a figure: those nearest to the front first, the others in the figures that follow."
PANEL = 1.75  # inches high
LETTERS = 28  # of a label beside a row of panels; more would reach into the title
BEHIND: dict[str, Any] = {"color": "#c9c9c9", "linewidth": 0.7, "zorder": 1}  # the other series of a panel


def page(names: Sequence[str], number: int) -> list[str]:
    """The series of one of the figures that show them all, nine a figure."""
    return list(names[number * TOO_MANY : (number + 1) * TOO_MANY])


def pages(count: int) -> int:
    """Figures that so many series need where each has a panel."""
    return max(1, -(-count // TOO_MANY))


def behind_handle() -> Line2D:
    """A legend entry for the other series of a panel."""
    return Line2D([], [], color=BEHIND["color"], linewidth=1.2, label="all the others")


def new_figure(count: int, *, extra: float = 1.25, columns: int = COLUMNS) -> Figure:
    """A figure as wide as a page with room for ``count`` panels."""
    return style.new_figure(height=PANEL * -(-count // columns) + extra)


def subplots(figure: Figure, count: int, *, columns: int = COLUMNS) -> list[Axes]:
    """``count`` panels with the same scales, left to right, top to bottom; those left over are taken away."""
    columns = min(columns, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, sharex=True, sharey=True)
    flat = list(grid.flat)
    for axes in flat[count:]:
        axes.remove()
    for axes in flat[max(0, count - columns) : count]:  # the lowest of each column shows the scale
        axes.tick_params(labelbottom=True)
    return flat[:count]


def name_panel(axes: Axes, name: str, *, width: int = 22) -> None:
    """The series' name above its panel, short enough not to meet its neighbour's."""
    axes.set_title(textwrap.fill(name.replace("_", " "), width), fontsize=8.5, pad=3)
    axes.tick_params(labelsize=8)


def share_limits(grid: Sequence[Axes], xlabel: str, ylabel: str, figure: Figure) -> None:
    """Labels at the edges only, few ticks in each panel."""
    for axes in grid:
        lowest = any(tick.label1.get_visible() for tick in axes.xaxis.get_major_ticks())
        axes.set(xlabel=xlabel if lowest else "", ylabel="")
        axes.xaxis.label.set_fontsize(7.5)
        axes.locator_params(axis="x", nbins=4)
        axes.locator_params(axis="y", nbins=5)
    specification = grid[0].get_subplotspec()
    rows = 1 if specification is None else specification.get_gridspec().nrows
    figure.supylabel(textwrap.fill(ylabel, LETTERS * rows), fontsize=10)


def spread(positions: Sequence[float], least: float) -> np.ndarray:
    """The same positions, moved as little as it takes to lie ``least`` apart: heights for labels side by side."""
    order = np.argsort(positions, kind="stable")
    values = np.asarray(positions, dtype=float)[order]
    blocks: list[list[float]] = []  # [sum of wanted first positions, members]
    for i, value in enumerate(values):
        blocks.append([value - i * least, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    starts = np.concatenate([np.full(int(members), total / members) for total, members in blocks]) if blocks else values
    placed = np.empty(len(values))
    placed[order] = starts + least * np.arange(len(values))
    return placed
