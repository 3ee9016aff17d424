"""The plainest and the busiest images, stage by stage (Figures 5 and 7 of the ATS paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import kept, style
from analysis.plots.base import Sample
from analysis.plots.samples import draw_kept, find_row, stages

CAPTION = (
    "Patches that still have a token of their own after a reducing block, {name} at {cost} GMACs on average; the "
    "number is how many are left. Above: of the {count} images pictured in this run, those that keep fewest tokens; "
    "below: those that keep most. The frame of the last picture is green (\u2713) where the answer is right, red "
    "(\u2717) where it is wrong."
)
EACH = 3  # images of either kind
SHOWN = 6  # stages


def ranked(table: pd.DataFrame, pictures: Sequence[Sample]) -> list[tuple[float, Sample, int]]:
    """(tokens over all blocks, picture, row of the table), fewest tokens first."""
    found = []
    for picture in pictures:
        row = find_row(table, picture)
        if row is not None:
            found.append((float(np.sum(table["tokens"].iloc[row])), picture, row))
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
    chosen = [(entry, "fewest") for entry in order[:each]] + [(entry, "most") for entry in order[-each:]]
    for line, ((_, picture, at), kind) in zip(grid, chosen, strict=True):
        line[0].imshow(picture.pixels)
        out = int(table["tokens"].iloc[at][-1])
        line[0].text(
            -0.12, 0.5, f"{kind}\n{out} out", transform=line[0].transAxes, ha="right", va="center", fontsize=8.5
        )
        for axes, block in zip(line[1:], shown, strict=True):
            right = bool(table["correct"].iloc[at]) if block == shown[-1] else None
            draw_kept(axes, picture, bits[at, min(block, bits.shape[1] - 1)], right=right)
    for axes in grid.flat:
        axes.set_axis_off()
    grid[0, 0].set_title("input", fontsize=8.5)
    for axes, block in zip(grid[0, 1:], shown, strict=True):
        axes.set_title(f"block {block}", fontsize=8.5)
    style.put_title(figure, title, subtitle)
    return figure
