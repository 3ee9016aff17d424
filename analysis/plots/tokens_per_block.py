"""How many tokens each method still has in each block, and how far images differ in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.frame import records_of
from analysis.plots import panels
from analysis.style import Look

CAPTION = (
    "Tokens entering each block and leaving the last, prefix tokens included: mean over images; the band "
    "holds the {band}. A line without a band belongs to a method that keeps the same number "
    "in every image. Each method is shown at its trial nearest to {level}."
)
MIDDLE, SPREAD = "middle 80 % of images", "mean ± 1 standard deviation over images"


def caption(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame], level: str) -> str:
    return CAPTION.format(level=level, band=MIDDLE if _counted(records_of(trials), images) else SPREAD)


@style.themed
def tokens_per_block(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    *,
    looks: Mapping[str, Look],
    title: str,
    subtitle: str,
    page: int = 0,
) -> Figure:
    """Mean tokens against block, one line a row of ``trials``; bands from the per-image tables, or of one standard
    deviation for all where a table is missing. A panel a method where there are many.
    """
    rows = [row for row in records_of(trials) if len(row["tokens"])]
    depth = max((len(row["tokens"]) for row in rows), default=1)
    names = ("entering block (out: leaving the last)", "tokens, prefix included")
    middle = _counted(rows, images)
    bounds = [_middle(row, images) if middle else _spread(row) for row in rows]
    varies = any(bool(np.any(high - low > 1e-9)) for low, high in bounds)
    band = [style.band_handle(MIDDLE if middle else SPREAD)] if varies else []
    if len(rows) > panels.TOO_MANY:
        start = page * panels.TOO_MANY
        shown = slice(start, start + panels.TOO_MANY)
        figure = panels.new_figure(len(rows[shown]))
        grid = panels.subplots(figure, len(rows[shown]))
        for axes, row, bound in zip(grid, rows[shown], bounds[shown], strict=True):
            for other in rows:
                axes.plot(range(len(other["tokens"])), other["tokens"], **panels.BEHIND)
            _draw(axes, row, bound, looks, width=1.8)
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
        _draw(axes, row, bounds[i], looks, width=1.6 + 2 * behind, size=6 + 3 * behind)
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
    bounds: tuple[np.ndarray, np.ndarray],
    looks: Mapping[str, Look],
    *,
    width: float,
    size: float = 4,
) -> None:
    """One method's line and band."""
    look = style.look_of(row["variant"], looks)
    blocks = np.arange(len(row["tokens"]))
    low, high = bounds
    if np.any(high - low > 1e-9):
        axes.fill_between(blocks, low, high, color=look.colour, alpha=0.18, linewidth=0)
    line = look.line() | {"linewidth": width, "markersize": size}
    axes.plot(blocks, row["tokens"], label=row["variant"], **line)


def _coincide(first: list[float], second: list[float]) -> bool:
    """Whether two lines could not be told apart on paper: nowhere 2 % of the first count apart."""
    return len(first) == len(second) and bool(np.abs(np.subtract(first, second)).max() <= 0.02 * first[0])


def _counts(row: Mapping[Any, Any], images: Mapping[str, pd.DataFrame]) -> np.ndarray | None:
    """(images, blocks + 1) tokens of a trial; None where it left none."""
    key = str(row["key"])
    if key not in images or "tokens" not in images[key] or not len(images[key]):
        return None
    counts = np.stack(images[key]["tokens"].to_list())
    return counts if counts.shape[1] == len(row["tokens"]) else None


def _counted(rows: Sequence[Mapping[Any, Any]], images: Mapping[str, pd.DataFrame]) -> bool:
    """Whether the tokens of each image are known of every row: a band means the same for all."""
    return all(_counts(row, images) is not None for row in rows if len(row["tokens"]))


def _middle(row: Mapping[Any, Any], images: Mapping[str, pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the middle 80 % of images for each block."""
    low, high = np.quantile(_counts(row, images), [0.1, 0.9], axis=0)  # type: ignore[arg-type]
    return low, high


def _spread(row: Mapping[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """One standard deviation about the mean for each block, within what there can be of tokens."""
    mean, std = (np.asarray(row[name], dtype=float) for name in ("tokens", "tokens_std"))
    half = std if std.shape == mean.shape else np.zeros_like(mean)
    return np.clip(mean - half, 0, None), np.clip(mean + half, None, mean[0])
