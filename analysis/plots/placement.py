"""Where in the network to reduce (Table A.4 of the ATS paper, and beyond): accuracy for each placement at
equal cost.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.facts.matching import INTERPOLATED, MATCH, NEAR, at_cost, targets
from analysis.facts.spec import Facts
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_intervals
from analysis.style import Look

CAPTION = (
    "Each colour is one cost; a placement appears in it where a trial was calibrated to it, else came within {near} of "
    "the dense model's cost of it, else between its own two neighbours{cross}. Above: top-1 accuracy with 95 % "
    "intervals over images. Below: the cost reached, because costs match only nearly. Lines join neighbouring single "
    "blocks only; sets of blocks stand on their own to the right. A late block cannot save more than what comes after "
    "it, and not every placement was run at every cost: a missing point was not reached or not run."
)
SET = 1.75  # room for a set of blocks, where a single block has 1
FITS = 8  # characters of a tick that a set's room holds, up to ROOM places
ROOM = 20


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


def caption(facts: Facts, scene: Scene) -> str:
    near = f"{100 * (NEAR if targets(facts.trials) else MATCH):.0f} %"
    parts = [at_cost(facts.rows, level, by="placement") for level in facts.placement_levels]
    between = any((part["how"] == INTERPOLATED).any() for part in parts)
    return CAPTION.format(near=near, cross=" (marked by a cross)" if between else "")


def _places(rows: pd.DataFrame) -> tuple[dict[str, float], int]:
    """Where each placement stands, single blocks at their index, sets with room for their longer names; and the place
    from which on there are sets.
    """
    seen, names = dict(zip(rows["placement"], rows["blocks"], strict=True)), placements(rows)
    blocks = {name: float(seen[name][0]) for name in names if len(seen[name]) == 1}
    edge = int(max(blocks.values(), default=-1)) + 1
    sets = [name for name in names if name not in blocks]
    return blocks | {name: edge - 1 + SET * (i + 0.85) for i, name in enumerate(sets)}, edge


@style.themed
def placement(facts: Facts, scene: Scene, title: str) -> Figure:
    """Top-1 accuracy and reached GMACs against placement, one curve for each cost that several placements
    reach.
    """
    rows, levels = facts.rows, facts.placement_levels
    names = placements(rows)
    single = sum(len(blocks) == 1 for blocks in dict(zip(rows["placement"], rows["blocks"], strict=True)).values())
    places, edge = _places(rows)
    figure = style.new_figure(height=5.4)
    accuracy, cost = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
    dense = facts.dense
    parts = [
        (
            f"about {style.cost(level)} GMACs{'' if np.isnan(dense) else f' ({100 * level / dense:.0f} % of dense)'}",
            at_cost(rows, level, by="placement"),
        )
        for level in levels
    ] or [("every trial", rows.assign(how=""))]
    looks = {name: style.look(slot) for slot, (name, _) in enumerate(parts)}
    for slot, (name, part) in enumerate(parts):
        place = part["placement"].map(places).astype(float)
        place = place + 0.16 * (slot - (len(parts) - 1) / 2)  # side by side: intervals of different costs never overlap
        _draw(accuracy, cost, part.assign(_place=place).sort_values("_place"), name, looks, edge)
    if not np.isnan(facts.dense_top1):
        style.draw_dense(accuracy, gmacs=None, value=100 * facts.dense_top1)
    if 0 < single < len(names):
        for axes in (accuracy, cost):
            axes.axvline(edge - 0.4, color="#b0b0b0", linewidth=0.8)
    ticks: Sequence[str] = [short(name) for name in names]
    span = places[names[-1]] + 1.2
    # A tick of several blocks goes over several lines where its room is too narrow for one.
    fits = max(3, int(FITS * ROOM / max(ROOM, span)))
    ticks = [textwrap.fill(tick, fits) if i >= single else tick for i, tick in enumerate(ticks)]
    cost.set_xticks([places[name] for name in names], ticks, fontsize=9 if span > 12 else None)
    cost.set(
        xlabel="reducing block (left) or set of blocks (right)" if single else "reducing blocks",
        ylabel="GMACs",
    )
    accuracy.set(ylabel=style.TOP1, xlim=(-0.6, places[names[-1]] + (0.6 if single == len(names) else 0.5 * SET)))
    cost.set_ylim(0, 1.1 * float(rows["gmacs_mean"].max()))
    style.put_title(figure, title, scene.subtitle)
    handles = [*(style.handle(name, looks) for name, _ in parts), style.interval_handle()]
    handles += [style.cross_handle()] if any((part["how"] == INTERPOLATED).any() for _, part in parts) else []
    style.put_legend(figure, handles if np.isnan(facts.dense_top1) else [*handles, style.dense_handle(star=False)])
    return style.finish(figure)


def _draw(accuracy: Axes, cost: Axes, part: pd.DataFrame, name: str, looks: Mapping[str, Look], edge: int) -> None:
    """One cost's points in both panels; only neighbouring single blocks are joined by a line: what lies between two
    others was not measured.
    """
    place = part["_place"].to_numpy()
    ends = (np.diff(place) > 1.01) | (place[1:] >= edge - 0.5) if len(place) else np.array([], dtype=bool)
    runs = np.concatenate([[0], np.cumsum(ends)])[: len(place)]
    for _, rows in part.groupby(runs, sort=False):
        line = {} if len(rows) > 1 else {"linestyle": "none"}
        if len(rows):
            draw_intervals(accuracy, rows["_place"], rows, name=name, looks=looks, joined=len(rows) > 1)
            between = rows[rows["how"] == INTERPOLATED]
            accuracy.plot(between["_place"], 100 * between["top1"], "x", color="white", markersize=4, zorder=6)
            cost.plot(rows["_place"], rows["gmacs_mean"], label=name, **{**looks[name].line(), **line})


PLOT = Plot(
    placement,
    "{title}: accuracy by placement at equal cost",
    caption,
    suffix="_by_block",
    needs=lambda facts: facts.rows["placement"].nunique() > 1,
)
