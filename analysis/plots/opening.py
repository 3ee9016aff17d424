"""The figure that opens a README: what survives of an image, and what it costs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from analysis import style
from analysis.facts.kept import packed
from analysis.facts.spec import Facts
from analysis.frame import AnalysisError, records_of, reducer_names
from analysis.plots import labels
from analysis.plots.base import Sample, Scene
from analysis.plots.samples import darken, find_row, kept_patches

PICTURED = ("ats", "evit", "tome")  # registered names, a row of pictures each
NAMED = (*PICTURED, "topk", "random")  # with a colour and a name; and the best of all others
BLOCKS = (3, 6, 9)
AT = 0.5  # share of the dense cost at which pictures are shown and the best is chosen
NEAR = 0.1  # of it: how far a trial may stand from there
WIDTH, HEIGHT = 12.0, 4.2  # inches
SMALL = 8.5  # points


def variants(facts: Facts) -> dict[str, str]:
    """Registered name -> the series in which that method acts alone and does best at the pictured cost; under ""
    the best of all other series.
    """
    near = _near(facts)
    found: dict[str, str] = {}
    for row in records_of(near.sort_values("top1", ascending=False, kind="stable")):
        names = reducer_names(row["reducer"])
        if len(names) == 1 and names[0] in NAMED:
            found.setdefault(names[0], row["variant"])
    others = near[~near["variant"].isin(list(found.values())) & ~near["variant"].str.contains("oracle")]
    if len(others):
        found[""] = str(others.sort_values("top1", ascending=False, kind="stable")["variant"].iloc[0])
    return found


def _near(facts: Facts) -> pd.DataFrame:
    """Of each series the trial nearest to the pictured cost, if it is near."""
    rows = facts.rows.assign(off=(facts.rows["gmacs_mean"] / facts.dense - AT).abs())
    rows = rows.sort_values("off", kind="stable").drop_duplicates("variant")
    return rows[rows["off"] < NEAR]


@style.themed
def opening(facts: Facts, scene: Scene) -> Figure:
    """Left: one image and its patches that survive at blocks 3, 6 and 9 under ATS, EViT and ToMe. Right: accuracy
    against cost, six methods named on their curves with their 95 % bands, all others grey.

    Raises:
        AnalysisError: the results hold none of these methods, or no picture.
    """
    known = variants(facts)
    pictured = [known[name] for name in PICTURED if name in known]
    if not pictured or not scene.pictures:
        raise AnalysisError(
            "the opening figure needs a run of the spec `methods` with pictures (OUT/samples) and its images; run it"
        )
    figure = style.new_figure(height=HEIGHT, width=WIDTH)
    grid = figure.add_gridspec(1, 2, width_ratios=[1.0, 1.45])
    _pictures(figure, grid[0], facts, scene, pictured)
    _curves(figure, figure.add_subplot(grid[1]), facts, scene, list(known.values()))
    return figure


def _pictures(figure: Figure, place: SubplotSpec, facts: Facts, scene: Scene, names: Sequence[str]) -> None:
    sample = _telling(facts, scene.pictures, names)
    grid = place.subgridspec(len(names), 1 + len(BLOCKS), wspace=0.06, hspace=0.28)
    near = _near(facts).set_index("variant")
    for line, name in enumerate(names):
        key = str(near.loc[name, "key"])
        bits, at = packed(facts.images, key), find_row(facts.images[key], sample)
        for column in range(1 + len(BLOCKS)):
            axes = figure.add_subplot(grid[line, column])
            axes.set_axis_off()
            if column == 0:
                axes.imshow(sample.pixels)
                share = near["gmacs_mean"].loc[name] / facts.dense
                axes.set_title(f"{name.replace('_', ' ')}\n{100 * share:.0f} % of the cost", fontsize=SMALL, loc="left")
            elif bits is not None and at is not None:
                kept = kept_patches(bits[at, BLOCKS[column - 1]], sample.grid)
                axes.imshow(darken(sample.pixels, kept))
                axes.set_title(f"block {BLOCKS[column - 1]}: {int(kept.sum())}", fontsize=SMALL)


def _telling(facts: Facts, pictures: Sequence[Sample], names: Sequence[str]) -> Sample:
    """The picture that most of the methods get right; of several the first."""
    near = _near(facts).set_index("variant")

    def right(sample: Sample) -> int:
        tables = [facts.images[str(near.loc[name, "key"])] for name in names]
        rows = [find_row(table, sample) for table in tables]
        return sum(bool(t["correct"].iloc[r]) for t, r in zip(tables, rows, strict=True) if r is not None)

    return max(pictures, key=right)


def _curves(figure: Figure, axes: Axes, facts: Facts, scene: Scene, named: list[str]) -> None:
    looks = {name: style.look(slot) for slot, name in enumerate(named)}  # so few can each have a colour of its own
    rows = facts.rows.assign(share=100 * facts.rows["gmacs_mean"] / facts.dense)
    for name, part in rows.groupby("variant", sort=False):
        part = part.sort_values("share", kind="stable")
        if name not in named:
            axes.plot(part["share"], 100 * part["top1"], color="#c9c9c9", linewidth=1.0, marker=".", zorder=1)
            continue
        look = looks[str(name)]
        bounds = 100 * part["top1_low"], 100 * part["top1_high"]
        axes.fill_between(part["share"], *bounds, color=look.colour, alpha=0.12, linewidth=0, zorder=1.5)
        axes.plot(part["share"], 100 * part["top1"], label=name, **look.line())
    inner = rows[rows["variant"].isin(named)]
    low, high = float(inner["share"].min()), float(inner["share"].max())
    axes.set_xlim(low - 2, high + 2)
    top1 = 100 * inner["top1"].to_numpy(dtype=float)
    best = max(float(np.nanmax(top1)), 100 * facts.dense_top1)
    axes.set_ylim(float(np.nanmin(top1)) - 2, best + 2)
    axes.axhline(100 * facts.dense_top1, color=style.GREY, linestyle=":", linewidth=1.2)
    above: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "fontsize": SMALL, "color": style.GREY}
    axes.annotate("dense", (low - 1.5, 100 * facts.dense_top1), **above)
    axes.set(xlabel="share of the dense model's multiply-adds (%)", ylabel=style.TOP1)
    axes.set_title(scene.subtitle.splitlines()[0], fontsize=SMALL, loc="left")
    labels.beside(figure, axes, named, looks)
