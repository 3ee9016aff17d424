"""How many tokens each method still has in each block, and how far images differ in it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
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
    std.
    """
    figure = style.new_figure(height=4.8)
    axes = figure.subplots()
    rows = [row for row in trials.to_dict("records") if len(row["tokens"])]
    for i, row in enumerate(rows):
        look = style.look_of(row["variant"], looks)
        blocks = np.arange(len(row["tokens"]))
        low, high = _middle(row, images)
        if np.any(high - low > 1e-9):
            axes.fill_between(blocks, low, high, color=look.colour, alpha=0.18, linewidth=0)
        # Methods with the same budget keep the same number: of lines that coincide, those behind are wider.
        behind = sum(_coincide(row["tokens"], other["tokens"]) for other in rows[i + 1 :])
        wide = {"linewidth": 1.6 + 2 * behind, "markersize": 6 + 3 * behind}
        axes.plot(blocks, row["tokens"], label=row["variant"], **{**look.line(), **wide})
    depth = max((len(row["tokens"]) for row in rows), default=1)
    axes.set_xticks(range(depth), [*map(str, range(depth - 1)), "out"])
    axes.set(xlabel="entering block (out: leaving the last)", ylabel="tokens, prefix included", ylim=(0, None))
    style.put_title(figure, title, subtitle)
    entries = [
        (row["variant"], f"{style.label(row['variant'])} ({style.cost(row['gmacs_mean'])} GMACs)") for row in rows
    ]
    handles = [style.handle(name, looks) for name, _ in entries]
    for entry, (_, text) in zip(handles, entries, strict=True):
        entry.set_label(text)
    style.put_legend(figure, handles)
    return style.finish(figure)


def _coincide(first: list[float], second: list[float]) -> bool:
    """Whether two lines could not be told apart on paper: nowhere 2 % of the first count apart."""
    return len(first) == len(second) and bool(np.abs(np.subtract(first, second)).max() <= 0.02 * first[0])


def _middle(row: Mapping[str, object], images: Mapping[str, pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
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
