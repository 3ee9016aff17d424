"""Accuracy against cost: one curve a series, the dense model as the point of reference. Fits every spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from analysis import style
from analysis.facts.spec import Facts
from analysis.frame import records_of
from analysis.plots import labels, panels
from analysis.plots.base import Plot, Scene
from analysis.style import Look

CAPTION = (
    "Top-1 accuracy against multiply-adds as executed, mean over images; bars are 95 % intervals over "
    "images. The star and the dashed line are the same model without any reduction. The upper axis is the "
    "share of its cost."
)
CAPTION_MANY = (
    "Top-1 accuracy against multiply-adds as executed, mean over images: one series a panel with its 95 % band over "
    "images, all others in grey behind it. The star and the dashed line are the same model without any reduction."
)
SEEDS = " Small hollow circles are single seeds, the curve is their mean; its interval is over images, not over seeds."


def caption(facts: Facts, scene: Scene) -> str:
    """What the figure of these trials shows."""
    many = len(facts.series) > panels.TOO_MANY
    text = (CAPTION_MANY if many else CAPTION) + (SEEDS if has_seeds(facts) else "") + labels.below(facts)
    return text + panels.MORE if many else text


def has_seeds(facts: Facts) -> bool:
    return bool((facts.rows["seeds"] > 1).any())


def draw_curves(axes: Axes, facts: Facts, *, looks: Mapping[str, Look]) -> list[str]:
    """Draw accuracy against GMACs with the dense reference; returns the series drawn, in order."""
    for name in facts.series:
        part = facts.rows[facts.rows["variant"] == name].sort_values("gmacs_mean", kind="stable")
        # A series of several placements is no curve over cost: its points stand alone.
        joined = part["placement"].nunique() < 2
        draw_intervals(axes, part["gmacs_mean"], part, name=name, looks=looks, joined=joined)
    draw_reference(axes, facts)
    axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
    labels.end_axis(axes, facts)
    return facts.series


def legend(names: Sequence[str], looks: Mapping[str, Look], facts: Facts, *, star: bool = True) -> list[Line2D]:
    """Entries for every mark of ``draw_curves``: the series, their intervals, single seeds, the plain model."""
    handles = [*(style.handle(name, looks) for name in names), style.interval_handle()]
    handles += [style.seeds_handle()] if has_seeds(facts) else []
    return handles + ([] if np.isnan(facts.dense_top1) else [style.dense_handle(star=star)])


def put_names(figure: Figure, axes: Axes, names: list[str], scene: Scene, facts: Facts, *more: Line2D) -> None:
    """Many names beside their curves, few in the legend; the other marks in the legend."""
    direct = len(names) > labels.FEW
    if direct:
        axes.set_ylim(axes.get_ylim())
        labels.beside(figure, axes, names, scene.looks)
    style.put_legend(figure, [*legend([] if direct else names, scene.looks, facts), *more])


def draw_reference(axes: Axes, facts: Facts, *, at_cost: bool = True) -> None:
    """The dense model's line, and its star where the axis is cost."""
    if not np.isnan(facts.dense_top1):
        style.draw_dense(axes, gmacs=facts.dense if at_cost else None, value=100 * facts.dense_top1)


def draw_intervals(
    axes: Axes, x: pd.Series, rows: pd.DataFrame, *, name: str, looks: Mapping[str, Look], joined: bool = True
) -> None:
    """One series of top-1 accuracies with their 95 % intervals as error bars, joined by a line or not; single seeds
    as small hollow circles.
    """
    top1 = 100 * rows["top1"]
    # A bound that is missing (nan) draws as no bar, and rounding can put a bound a hair on the wrong side.
    bars = np.stack([top1 - 100 * rows["top1_low"], 100 * rows["top1_high"] - top1])
    bars = np.clip(bars, 0, None)
    look = style.look_of(name, looks)
    line = look.line() | ({} if joined else {"linestyle": "none"})
    axes.errorbar(x, top1, yerr=bars, elinewidth=1, capsize=2, label=name, **line)
    draw_seeds(axes, x, rows, colour=look.colour)
    style.settle(axes, x, top1, map(style.setting, records_of(rows)))


def draw_seeds(axes: Axes, x: pd.Series, rows: pd.DataFrame, *, colour: str) -> None:
    """Each seed's accuracy where several were averaged: a spread of its own, beside the interval over images."""
    if "seed_top1" not in rows:
        return
    points = [
        (at, 100 * one) for at, seeds in zip(x, rows["seed_top1"], strict=True) if len(seeds) > 1 for one in seeds
    ]
    if points:
        at, values = zip(*points, strict=True)
        axes.plot(
            at,
            values,
            linestyle="none",
            marker="o",
            markersize=3.4,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=0.8,
            zorder=4,
            gid="seeds",
        )


def share_axis(axes: Axes, facts: Facts) -> None:
    """A second scale on top: cost as a share of the dense model's."""
    dense = facts.dense
    if np.isnan(dense):
        return

    def to_share(gmacs: ArrayLike) -> NDArray[np.float64]:
        return 100 * np.asarray(gmacs, dtype=float) / dense

    def to_gmacs(share: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(share, dtype=float) * dense / 100

    top = axes.secondary_xaxis("top", functions=(to_share, to_gmacs))
    top.set_xlabel("share of the dense model's cost (%)", fontsize="small")
    top.tick_params(labelsize="small", length=3)
    top.spines["top"].set_visible(False)


@style.themed
def tradeoff(facts: Facts, scene: Scene, title: str) -> Figure:
    """Top-1 accuracy against GMACs for the finished trials of one spec."""
    if len(facts.series) > panels.TOO_MANY:
        return _many(facts, scene, title)
    figure = style.new_figure()
    axes = figure.subplots()
    names = draw_curves(axes, facts, looks=scene.looks)
    share_axis(axes, facts)
    style.put_title(figure, title, scene.subtitle)
    put_names(figure, axes, names, scene, facts)
    return style.finish(figure)


def _many(facts: Facts, scene: Scene, title: str) -> Figure:
    """The same as small multiples."""
    series = {str(name): part.sort_values("gmacs_mean") for name, part in facts.rows.groupby("variant", sort=False)}
    shown = panels.page(labels.seen(facts), scene.page)
    figure = panels.new_figure(len(shown))
    grid = panels.subplots(figure, len(shown))
    for axes, name in zip(grid, shown, strict=True):
        part = series[name]
        for other, rest in series.items():
            if other != name:
                axes.plot(rest["gmacs_mean"], 100 * rest["top1"], **panels.BEHIND, gid="others")
        look = style.look_of(name, scene.looks)
        axes.fill_between(
            part["gmacs_mean"],
            100 * part["top1_low"],
            100 * part["top1_high"],
            color=look.colour,
            alpha=0.25,
            linewidth=0,
        )
        line = look.line() | ({} if part["placement"].nunique() < 2 else {"linestyle": "none"})
        axes.plot(part["gmacs_mean"], 100 * part["top1"], label=name, **line)
        draw_seeds(axes, part["gmacs_mean"], part, colour=look.colour)
        settings = map(style.setting, records_of(part))
        style.settle(axes, part["gmacs_mean"], 100 * part["top1"], settings)
        draw_reference(axes, facts)
        panels.name_panel(axes, name)
    labels.end_axis(grid[0], facts)
    panels.share_limits(grid, style.GMACS, style.TOP1, figure)
    style.put_title(figure, title, scene.subtitle)
    band = style.band_handle("95 % interval over images")
    seeds = [style.seeds_handle()] if has_seeds(facts) else []
    style.put_legend(figure, [band, *seeds, panels.behind_handle(), style.dense_handle()])
    return style.finish(figure)


PLOT = Plot(
    tradeoff,
    "{title}: accuracy against cost",
    caption,
    needs=lambda facts: True,
    panels=lambda facts: len(labels.seen(facts)),
)
