"""A sheet of sample images with the patches that survive each reducing stage of a few methods."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis import style
from analysis.facts.kept import packed
from analysis.frame import records_of
from analysis.plots.base import Sample

CAPTION = (
    "Patches that still have a token of their own after a reducing block; the others are greyed. The "
    "number is how many of them are left; the frame of a method's last picture is green (and marked "
    "\u2713) where its answer is right, red (\u2717) where it is wrong. A method's name and mean cost "
    "stand above its columns."
)
RIGHT, WRONG = "#007a55", "#b2401f"
STAGES = 3  # pictures a method
SMALL = 8  # points
GAP = 0.18  # between methods, in pictures


def kept_patches(packed: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The packed bits of one block, (bytes,) uint8, as a (rows, columns) bool mask of surviving patches."""
    bits = np.unpackbits(packed)
    return bits[: grid[0] * grid[1]].astype(bool).reshape(grid)


def darken(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 with the patches that are gone washed to a bluish grey, their content still just
    visible.
    """
    rows = np.minimum(np.arange(pixels.shape[0]) * kept.shape[0] // pixels.shape[0], kept.shape[0] - 1)
    columns = np.minimum(np.arange(pixels.shape[1]) * kept.shape[1] // pixels.shape[1], kept.shape[1] - 1)
    mask = kept[rows[:, None], columns[None, :]][..., None]
    grey = pixels.mean(axis=2, keepdims=True)
    return np.where(mask, pixels, 0.25 * grey + np.array([84, 92, 122])).astype(np.uint8)


def stages(blocks: Sequence[int], limit: int = STAGES) -> list[int]:
    """At most ``limit`` of the reducing blocks, first and last among them."""
    if len(blocks) <= limit:
        return [int(block) for block in blocks]
    return [int(blocks[i]) for i in np.linspace(0, len(blocks) - 1, limit).round().astype(int)]


def find_row(table: pd.DataFrame, sample: Sample) -> int | None:
    """The sample's row in a per-image table, by its name, and by its number among several of one name; None where the
    table does not have it: another image's patches are not shown on it.
    """
    named = np.flatnonzero(table["image"].to_numpy(dtype=str) == sample.image)
    if len(named) == 1:
        return int(named[0])
    return sample.row if sample.row in named else None


@style.themed
def samples(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    pictures: Sequence[Sample],
    *,
    title: str,
    subtitle: str,
) -> Figure:
    """One row an image: the input, then each row of ``trials`` stage by stage."""
    methods = [
        (row, stages(row["blocks"])) for row in records_of(trials) if row["key"] in images and len(row["blocks"])
    ]
    widths = [
        1.0,
        *(width for _, shown in methods for width in (GAP, *(1.0 for _ in shown))),
    ]  # a gap before each method
    size = min(1.02, (style.WIDTH - 0.3) / sum(widths))  # inches: the sheet is as wide as a page
    figure = style.new_figure(height=(size + 0.18) * len(pictures) + 1.2)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0.01, hspace=0.01)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(pictures), len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, sample in zip(grid, pictures, strict=True):
        line[0].imshow(sample.pixels)
        column = 0
        for row, shown in methods:
            column += 2  # past the picture before and the gap
            bits, at = packed(images, row["key"]), find_row(images[row["key"]], sample)
            for block in shown:
                if bits is not None and at is not None and block < bits.shape[1]:
                    right = bool(images[row["key"]]["correct"].iloc[at]) if block == shown[-1] else None
                    draw_kept(line[column], sample, bits[at, block], right=right)
                column += block != shown[-1]
    _headings(figure, grid, methods)
    style.put_title(figure, title, subtitle)
    return figure


def draw_kept(axes: Axes, sample: Sample, packed: np.ndarray, *, right: bool | None) -> None:
    """One picture with its surviving patches and their number; framed where the answer is known."""
    kept = kept_patches(packed, sample.grid)
    axes.imshow(darken(sample.pixels, kept))
    text, colour = f"{int(kept.sum())}", "#333333"
    if right is not None:
        text, colour = (f"{text} \u2713", RIGHT) if right else (f"{text} \u2717", WRONG)
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2.4))
    axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=SMALL, color=colour)


def _headings(figure: Figure, grid: np.ndarray, methods: Sequence[tuple[dict[str, Any], list[int]]]) -> None:
    """What each column is; a method's name and cost stand over its own columns."""
    grid[0, 0].set_title("input", fontsize=SMALL)
    names = []
    for row, shown in methods:
        name = f"{row['variant'].replace('_', ' ')}, {style.cost(row['gmacs_mean'])} GMACs"
        names.append(textwrap.wrap(name, max(10, 9 * len(shown))))
    # Blank lines hold the room above: a name is wider than a column, and must not push columns apart.
    room = "\n" * max(2, *(1 + len(lines) for lines in names))
    column = 2
    for (_, shown), lines in zip(methods, names, strict=True):
        for i, block in enumerate(shown):
            grid[0, column + i].set_title(f"{room}block {block}", fontsize=SMALL)
        head = grid[0, column].annotate(
            "\n".join(lines),
            (0, 1),
            xytext=(0, 17),
            fontsize=8.5,
            xycoords="axes fraction",
            textcoords="offset points",
            fontweight="bold",
            annotation_clip=False,
        )
        head.set_in_layout(False)
        column += len(shown) + 1
