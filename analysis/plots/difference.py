"""Differences between series at equal cost, on the same images: what a curve against cost can only suggest."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import stats, style
from analysis.facts.comparison import Versus
from analysis.facts.matching import INTERPOLATED, dense_gmacs, targets
from analysis.facts.spec import Facts
from analysis.plots import panels
from analysis.plots.base import Plot, Scene
from analysis.style import Look

CAPTION = (
    "Top-1 of each series minus that of {reference} at the same cost, in points, with paired 95 % intervals over the "
    "same images. Filled: told apart at 5 % after Holm's correction over all {count} comparisons of this figure; "
    "hollow: not. {how}{aside}"
)
AIMED = "Costs are the targets that trials were calibrated to{between}."
OWN = "Each trial stands at its own cost, where {reference} is interpolated between its neighbours (a cross)."
ASIDE = " Series at one cost stand a little apart, so that their intervals can be seen."
MATCHED = "Costs are those that trials happened to share (within 3 % of the dense model's){between}."


def caption(facts: Facts, scene: Scene) -> str:
    found, trials = facts.versus, facts.trials
    between = " (a cross marks what was interpolated between its own neighbours)"
    used = any(one.how == INTERPOLATED for one in found)
    own = not targets(trials) and len({one.level for one in found}) == len(found) > 1
    how = OWN if own and used else (AIMED if targets(trials) else MATCHED).format(between=between if used else "")
    reference = found[0].reference.replace("_", " ") if found else "the reference"
    several = any(b - a < 1e-9 for a, b in itertools.pairwise(sorted(one.level for one in found)))
    few = len({one.name for one in found}) <= panels.TOO_MANY
    aside = ASIDE if several and few and _least_gap(found, dense_gmacs(trials)) else ""
    more = "" if few else panels.MORE
    return (
        CAPTION.format(reference=reference, count=len(found), how=how.format(reference=reference), aside=aside) + more
    )


def table(facts: Facts) -> pd.DataFrame:
    """The numbers drawn, shares 0 .. 1, with full keys."""
    return pd.DataFrame(
        [
            {
                "variant": one.name,
                "reference": one.reference,
                "level_gmacs": one.level,
                "gmacs": one.gmacs,
                "how": one.how,
                "difference": one.paired.difference,
                "low": one.paired.low,
                "high": one.paired.high,
                "p": one.paired.p_value,
                "mid_p": one.paired.mid_p,
                "p_holm": one.p_holm,
                "test": one.paired.test,
                "images": one.paired.images,
                "only_first": one.paired.first_only,
                "only_reference": one.paired.second_only,
                "keys": " ".join(one.keys),
            }
            for one in facts.versus
        ]
    )


def draw_versus(axes: Axes, found: Sequence[Versus], *, looks: Mapping[str, Look], width: float) -> list[str]:
    """Points with paired intervals against cost, series side by side within ``width`` GMACs; returns the series."""
    names = list(dict.fromkeys(one.name for one in found))
    for slot, name in enumerate(names):
        part = sorted((one for one in found if one.name == name), key=lambda one: one.level)
        shift = width * (slot - (len(names) - 1) / 2) / max(1, len(names))
        x = np.array([one.level + shift for one in part])
        y = np.array([100 * one.paired.difference for one in part])
        low = np.array([100 * (one.paired.difference - one.paired.low) for one in part])
        high = np.array([100 * (one.paired.high - one.paired.difference) for one in part])
        look = style.look_of(name, looks)
        line = look.line() | {"marker": "", "linewidth": 1.0, "label": name}
        axes.errorbar(x, y, yerr=np.clip([low, high], 0, None), elinewidth=1, capsize=2, **line)
        style.settle(axes, x, y, map(_said, part))
        for one, at, value in zip(part, x, y, strict=True):
            clear = one.told_apart
            axes.plot(
                [at],
                [value],
                marker=look.marker,
                markersize=6,
                linestyle="none",
                markeredgecolor=look.colour,
                markerfacecolor=look.colour if clear else "white",
                gid="apart" if clear else "same",
            )
            if one.how == INTERPOLATED:
                centre = "white" if clear else look.colour
                axes.plot([at], [value], marker="x", markersize=4, color=centre, linestyle="none", gid="interpolated")
    axes.axhline(0, color=style.DENSE_COLOUR, linewidth=1)
    return names


def _said(one: Versus) -> str:
    """A point in words."""
    told = "told apart" if one.told_apart else "not told apart"
    name = one.name.replace("_", " ")
    low, high = (f"{100 * value:+.1f}" for value in (one.paired.low, one.paired.high))
    return f"{name} at {style.cost(one.gmacs)} GMACs: {100 * one.paired.difference:+.1f} points [{low}, {high}], {told}"


def signs(found: Sequence[Versus]) -> list[Line2D]:
    """What filled, hollow, crossed and the bars mean, for the legend."""
    common: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "#6a6a6a", "markersize": 6}
    return [
        Line2D([], [], label=f"told apart (p < {stats.ALPHA:g}, Holm)", **common),
        Line2D([], [], label="not told apart", markerfacecolor="white", **common),
        *([style.cross_handle()] if any(one.how == INTERPOLATED for one in found) else []),
        style.interval_handle("paired 95 % interval"),
    ]


@style.themed
def difference(facts: Facts, scene: Scene, title: str) -> Figure:
    """Every series against the reference at each cost; a panel a series where there are many."""
    found, looks = facts.versus, scene.looks
    names = list(dict.fromkeys(one.name for one in found))
    reference = style.label(found[0].reference).replace("\n", " ")
    label = textwrap.fill(f"top-1 against {reference} (points)", 30)
    width = 0.6 * _least_gap(found, dense_gmacs(facts.trials))
    if len(names) > panels.TOO_MANY:
        shown = panels.page([name for name in facts.lacks if name in names], scene.page)
        figure = panels.new_figure(len(shown), extra=1.6)
        grid = panels.subplots(figure, len(shown))
        for axes, name in zip(grid, shown, strict=True):
            draw_versus(axes, [one for one in found if one.name == name], looks=looks, width=width)
            panels.name_panel(axes, name)
        panels.share_limits(grid, style.GMACS, label, figure)
        handles = signs(found)
    else:
        figure = style.new_figure(height=4.4)
        axes = figure.subplots()
        draw_versus(axes, found, looks=looks, width=width)
        axes.set(xlabel=style.GMACS, ylabel=label)
        handles = [*(style.handle(name, looks) for name in names), *signs(found)]
    style.put_title(figure, title, scene.subtitle)
    style.put_legend(figure, handles)
    return style.finish(figure)


def _least_gap(found: Sequence[Versus], dense: float) -> float:
    """The distance between neighbouring costs, for setting series side by side."""
    levels = sorted({one.level for one in found})
    gap = float(min(np.diff(levels))) if len(levels) > 1 else 0.1 * dense
    return gap if gap > 0.02 * dense else 0.0  # costs as they came: nothing to set apart


PLOT = Plot(
    difference,
    "{title}: differences at equal cost",
    caption,
    suffix="_difference",
    needs=lambda facts: len(facts.versus) > 1,  # a single point is told in words
    panels=lambda facts: len({one.name for one in facts.versus}),
    data=table,
)
