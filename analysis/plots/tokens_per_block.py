"""How many tokens each method still has in each block, and how far images differ in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.plots import panels
from analysis.style import Look

CAPTION = (
    "Tokens entering each block and leaving the last, prefix tokens included: mean over images; the band "
    "holds the middle 80 % of images. A line without a band belongs to a method that keeps the same number "
    "in every image. Each method is shown at its trial nearest to {level}."
)


@style.themed
def tokens_per_block(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    *,
    looks: Mapping[str, Look],
    title: str,
    subtitle: str,
) -> Figure:
    """Mean tokens against block, one line a row of ``trials``; bands from the per-image tables, else +- 1.28
    std. A panel a method where there are many.
    """
    rows = [row for row in trials.to_dict("records") if len(row["tokens"])]
    depth = max((len(row["tokens"]) for row in rows), default=1)
    names = ("entering block (out: leaving the last)", "tokens, prefix included")
    bounds = [_middle(row, images) for row in rows]
    varies = any(bool(np.any(high - low > 1e-9)) for low, high in bounds)
    band = [style.band_handle("middle 80 % of images")] if varies else []
    if len(rows) > panels.TOO_MANY:
        figure = panels.new_figure(len(rows))
        grid = panels.subplots(figure, len(rows))
        for axes, row in zip(grid, rows, strict=True):
            for other in rows:
                axes.plot(range(len(other["tokens"])), other["tokens"], **panels.BEHIND)
            _draw(axes, row, images, looks, width=1.8)
            panels.name_panel(axes, row["variant"])
        panels.share_limits(grid, "entering block", names[1], figure)
        for axes in grid:
            axes.set(ylim=(0, None))
            axes.set_xticks(range(0, depth, 3), [*map(str, range(0, depth - 1, 3)), "out"][: len(range(0, depth, 3))])
        style.put_title(figure, title, subtitle)
        style.put_legend(figure, [*band, panels.behind_handle()])
        return style.finish(figure)
    figure = style.new_figure(height=4.8)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        # Methods with the same budget keep the same number: of lines that coincide, those behind are wider.
        behind = sum(_coincide(row["tokens"], other["tokens"]) for other in rows[i + 1 :])
        _draw(axes, row, images, looks, width=1.6 + 2 * behind, size=6 + 3 * behind)
    axes.set_xticks(range(depth), [*map(str, range(depth - 1)), "out"])
    axes.set(xlabel=names[0], ylabel=names[1], ylim=(0, None))
    style.put_title(figure, title, subtitle)
    entries = [
        (row["variant"], f"{style.label(row['variant'])} ({style.cost(row['gmacs_mean'])} GMACs)") for row in rows
    ]
    handles = [style.handle(name, looks) for name, _ in entries]
    for entry, (_, text) in zip(handles, entries, strict=True):
        entry.set_label(text)
    style.put_legend(figure, [*handles, *band])
    return style.finish(figure)


def _draw(
    axes: Axes,
    row: Mapping[str, Any],
    images: Mapping[str, pd.DataFrame],
    looks: Mapping[str, Look],
    *,
    width: float,
    size: float = 4,
) -> None:
    """One method's line and band."""
    look = style.look_of(row["variant"], looks)
    blocks = np.arange(len(row["tokens"]))
    low, high = _middle(row, images)
    if np.any(high - low > 1e-9):
        axes.fill_between(blocks, low, high, color=look.colour, alpha=0.18, linewidth=0)
    line = look.line() | {"linewidth": width, "markersize": size}
    axes.plot(blocks, row["tokens"], label=row["variant"], **line)


def _coincide(first: list[float], second: list[float]) -> bool:
    """Whether two lines could not be told apart on paper: nowhere 2 % of the first count apart."""
    return len(first) == len(second) and bool(np.abs(np.subtract(first, second)).max() <= 0.02 * first[0])


def _middle(row: Mapping[str, Any], images: Mapping[str, pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the middle 80 % of images for each block."""
    mean = np.asarray(row["tokens"], dtype=float)
    key = str(row["key"])
    if key in images and "tokens" in images[key] and len(images[key]):
        counts = np.stack(images[key]["tokens"].to_list())
        if counts.shape[1] == len(mean):
            low, high = np.quantile(counts, [0.1, 0.9], axis=0)
            return low, high
    std = np.asarray(row["tokens_std"], dtype=float)
    half = 1.28 * std if std.shape == mean.shape else np.zeros_like(mean)
    return mean - half, mean + half
