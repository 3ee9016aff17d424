"""Where in the network to reduce (Table A.4 of the ATS paper, and beyond): accuracy for each placement at
equal cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.matching import INTERPOLATED, MATCH, at_cost, cost_levels, dense_gmacs, merge_seeds
from analysis.plots.tradeoff import draw_intervals
from analysis.style import Look

CAPTION = (
    "Each curve is one cost; a placement appears on it where a trial was calibrated to it, else came within "
    f"{MATCH:.0%} of the dense model's cost of it, else (marked by a cross) between its own two neighbours. Above: "
    "top-1 accuracy with 95 % intervals. Below: the cost reached, because costs match only nearly. Lines join single "
    "blocks only; sets of blocks stand on their own to the right. Early blocks cannot reach high costs and late blocks "
    "cannot reach low ones: a missing point is a cost that the placement did not reach."
)


def placements(rows: pd.DataFrame) -> list[str]:
    """Placements from left to right: single blocks by their index, then sets of blocks."""
    seen = dict(zip(rows["placement"], rows["blocks"], strict=True))

    def rank(name: str) -> tuple[bool, int, int, str]:
        blocks = seen[name]
        return len(blocks) != 1, min(blocks, default=0), len(blocks), name

    return sorted(seen, key=rank)


def short(placement: str) -> str:
    """A placement as a tick: "block 3" -> "3", "blocks 3-11" -> "3-11"."""
    return placement.removeprefix("blocks").removeprefix("block").strip() or placement


def placement_levels(trials: pd.DataFrame) -> list[float]:
    """The costs drawn: at most three, so that intervals stay apart."""
    return cost_levels(merge_seeds(trials), by="placement", count=3)


@style.themed
def placement(trials: pd.DataFrame, *, title: str, subtitle: str) -> Figure:
    """Top-1 accuracy and reached GMACs against placement, one curve for each cost that several placements
    reach.
    """
    rows = merge_seeds(trials[~trials["dense"]])
    names = placements(rows)
    single = sum(len(blocks) == 1 for blocks in dict(zip(rows["placement"], rows["blocks"], strict=True)).values())
    levels = placement_levels(trials)
    figure = style.new_figure(height=5.4)
    accuracy, cost = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
    dense = dense_gmacs(trials)
    parts = [
        (
            f"about {style.cost(level)} GMACs ({100 * level / dense:.0f} % of dense)",
            at_cost(rows, level, by="placement"),
        )
        for level in levels
    ] or [("every trial", rows.assign(how=""))]
    looks = {name: style.look(slot) for slot, (name, _) in enumerate(parts)}
    for slot, (name, part) in enumerate(parts):
        place = part["placement"].map(names.index)
        place = place + 0.14 * (slot - (len(parts) - 1) / 2)  # side by side: intervals of different costs never overlap
        _draw(accuracy, cost, part.assign(_place=place).sort_values("_place"), name, looks, single)
    dense_top1 = trials["dense_top1"].dropna()
    if len(dense_top1):
        style.draw_dense(accuracy, gmacs=None, value=100 * float(dense_top1.iloc[0]))
    if 0 < single < len(names):
        for axes in (accuracy, cost):
            axes.axvline(single - 0.5, color="#b0b0b0", linewidth=0.8)
    ticks: Sequence[str] = [short(name) for name in names]
    crowded = sum(map(len, ticks)) > 60
    cost.set_xticks(np.arange(len(names)), ticks, rotation=40 if crowded else 0, ha="right" if crowded else "center")
    cost.set(
        xlabel="reducing block (left) or set of blocks (right)" if single else "reducing blocks",
        ylabel="GMACs",
    )
    accuracy.set(ylabel=style.TOP1, xlim=(-0.6, len(names) - 0.4))
    cost.set_ylim(0, 1.1 * float(rows["gmacs_mean"].max()))
    style.put_title(figure, title, subtitle)
    handles = [style.handle(name, looks) for name, _ in parts]
    style.put_legend(figure, [*handles, style.dense_handle()] if len(dense_top1) else handles)
    return style.finish(figure)


def _draw(accuracy: Axes, cost: Axes, part: pd.DataFrame, name: str, looks: Mapping[str, Look], single: int) -> None:
    """One cost's points in both panels; only single blocks are joined by a line."""
    joined = part[part["_place"] < single - 0.5]
    apart = part[part["_place"] >= single - 0.5]
    for rows, line in ((joined, {}), (apart, {"linestyle": "none"})):
        if len(rows):
            draw_intervals(accuracy, rows["_place"], rows, name=name, looks=looks, joined=rows is joined)
            between = rows[rows["how"] == INTERPOLATED]
            accuracy.plot(between["_place"], 100 * between["top1"], "x", color="white", markersize=4, zorder=6)
            cost.plot(rows["_place"], rows["gmacs_mean"], label=name, **{**looks[name].line(), **line})
