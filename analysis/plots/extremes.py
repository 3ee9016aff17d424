"""The images that keep fewest and most tokens, stage by stage (Figures 5 and 7 of the ATS paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.facts import kept
from analysis.plots.base import Sample
from analysis.plots.samples import draw_kept, find_row, stages

CAPTION = (
    "Patches that still have a token of their own after a reducing block, {name} at {cost} GMACs on average; the "
    "number is how many are left. Only the {count} images whose thumbnails the run stored are ranked, not all "
    "{images:,}: above those of them that keep fewest tokens, below those that keep most; at the left the rank, and "
    "the tokens that enter a block, prefix included, mean over all blocks. An example, no evidence: that is in the "
    "{evidence}. The frame of the last picture is green (\u2713) where the answer is right, red "
    "(\u2717) where it is wrong."
)
EACH = 3  # images of either kind
SHOWN = 6  # stages


def ranked(table: pd.DataFrame, pictures: Sequence[Sample]) -> list[tuple[float, Sample, int]]:
    """(tokens entering all blocks, picture, row of the table), fewest tokens first."""
    found = []
    for picture in pictures:
        row = find_row(table, picture)
        if row is not None:
            found.append((float(np.sum(table["tokens"].iloc[row][:-1])), picture, row))
    return sorted(found, key=lambda entry: entry[0])


@style.themed
def extremes(
    row: Mapping[str, Any],
    images: Mapping[str, pd.DataFrame],
    pictures: Sequence[Sample],
    *,
    title: str,
    subtitle: str,
) -> Figure | None:
    """One line an image: the input, then its surviving patches at each stage; None where there is nothing to show."""
    bits, table = kept.packed(images, row["key"]), images[row["key"]]
    order = ranked(table, pictures)
    if bits is None or len(order) < 2 or order[0][0] == order[-1][0]:
        return None
    each = min(EACH, len(order) // 2)
    shown = stages(row["blocks"], SHOWN)
    size = style.WIDTH / (len(shown) + 1.75)
    figure = style.new_figure(height=2 * each * (size + 0.17) + 1.2)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(2 * each, len(shown) + 1, squeeze=False)
    places = [*range(each), *range(len(order) - each, len(order))]
    chosen = [(order[place], f"{place + 1} of {len(order)}") for place in places]
    for line, ((_, picture, at), kind) in zip(grid, chosen, strict=True):
        line[0].imshow(picture.pixels)
        mean = float(np.mean(table["tokens"].iloc[at][:-1]))
        text = f"{kind}\nmean {mean:.0f}"
        line[0].text(-0.12, 0.5, text, transform=line[0].transAxes, ha="right", va="center", fontsize=8.5)
        for axes, block in zip(line[1:], shown, strict=True):
            right = bool(table["correct"].iloc[at]) if block == shown[-1] else None
            if block < bits.shape[1]:
                draw_kept(axes, picture, bits[at, block], right=right)
    for axes in grid.flat:
        axes.set_axis_off()
    grid[0, 0].set_title("input", fontsize=8.5)
    for axes, block in zip(grid[0, 1:], shown, strict=True):
        axes.set_title(f"block {block}", fontsize=8.5)
    style.put_title(figure, title, subtitle)
    return figure
