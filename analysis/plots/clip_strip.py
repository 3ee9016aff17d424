"""A strip of frames with the patches that survive in each, a line a method."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.facts.clips import ClipGrid
from analysis.facts.kept import packed
from analysis.frame import records_of
from analysis.plots.base import Sample
from analysis.plots.samples import RIGHT, SMALL, WRONG, darken, find_row

CAPTION = (
    "Clips frame by frame, and below each the patches that still have a token of their own after the last block of a "
    "few methods; the others are greyed. The number is how many are left in a frame; a method's name is green (and "
    "marked \u2713) where its answer is right, red (\u2717) where it is wrong.{left} An example, no evidence."
)
CLIPS = 2  # shown: of those stored the plainest and the busiest
FRAMES = 8  # of a clip, evenly


def shown_steps(steps: int) -> list[int]:
    """The frames that a strip has room for."""
    return [int(step) for step in np.unique(np.linspace(0, steps - 1, min(steps, FRAMES)).round())]


def caption(grid: ClipGrid) -> str:
    shown = len(shown_steps(grid.steps))
    return CAPTION.format(left="" if shown == grid.steps else f" {shown} of {grid.steps} frames are shown.")


@style.themed
def clip_strip(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    pictures: Sequence[Sample],
    grid: ClipGrid,
    *,
    title: str,
    subtitle: str,
) -> Figure:
    """Of each clip its frames, and below them each row of ``trials``."""
    clips = list(pictures) if len(pictures) <= CLIPS else [pictures[0], pictures[-1]]
    methods = [row for row in records_of(trials) if row["key"] in images]
    steps = shown_steps(grid.steps)
    size = min(1.0, (style.WIDTH - 1.5) / len(steps))
    lines = len(clips) * (1 + len(methods))
    figure = style.new_figure(height=(size + 0.16) * lines + 0.9)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
    table = figure.subplots(lines, 1 + len(steps), squeeze=False, width_ratios=[1.35 / size, *(1.0 for _ in steps)])
    for axes in table.flat:
        axes.set_axis_off()
    line = 0
    for clip in clips:
        frames = _frames(clip, grid)
        _name(table[line, 0], "input", "#333333")
        for axes, step in zip(table[line, 1:], steps, strict=True):
            axes.imshow(frames[step])
            axes.text(0.5, 1.02, f"frame {step}" if grid.steps == len(frames) else f"step {step}", ha="center",
                      va="bottom", fontsize=SMALL, transform=axes.transAxes)  # fmt: skip
        line += 1
        for row in methods:
            bits, at = packed(images, row["key"]), find_row(images[row["key"]], clip)
            if bits is not None and at is not None:
                kept = np.unpackbits(bits[at, -1])[: grid.steps * grid.patches].astype(bool)
                right = bool(images[row["key"]]["correct"].iloc[at])
                mark, colour = ("\u2713", RIGHT) if right else ("\u2717", WRONG)
                name = f"{str(row['variant']).replace('_', ' ')} {mark}"
                _name(table[line, 0], name, colour)
                _draw(table[line, 1:], frames, kept.reshape(grid.steps, grid.rows, grid.columns), steps)
            line += 1
    style.put_title(figure, title, subtitle)
    return figure


def _frames(clip: Sample, grid: ClipGrid) -> np.ndarray:
    """(steps, H, W, 3): the thumbnail has a frame for each step, one below the other."""
    return clip.pixels.reshape(grid.steps, -1, *clip.pixels.shape[1:])


def _draw(axes: np.ndarray, frames: np.ndarray, kept: np.ndarray, steps: Sequence[int]) -> None:
    for place, step in zip(axes, steps, strict=True):
        place.imshow(darken(frames[step], kept[step]))
        place.text(0.5, -0.02, f"{int(kept[step].sum())}", transform=place.transAxes, ha="center", va="top",
                   fontsize=SMALL, color="#333333")  # fmt: skip


def _name(axes: Axes, text: str, colour: str) -> None:
    axes.text(1.0, 0.5, "\n".join(textwrap.wrap(text, 18)), transform=axes.transAxes, ha="right", va="center",
              fontsize=SMALL, color=colour)  # fmt: skip
