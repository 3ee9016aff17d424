"""Do the surviving patches cover the object? Possible only where the object's mask is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import stats, style
from analysis.facts.matching import merge_seeds
from analysis.frame import records_of
from analysis.plots import panels
from analysis.style import Look

CAPTION = (
    "Share of the patches on the object that still have a token of their own after the last block, mean over "
    "images{where} A merged group counts for its heaviest member only, so merging methods keep more information about "
    "the object than their curve shows.{left}"
)
BOTH = (
    " with 95 % bootstrap intervals. Left: against multiply-adds as executed. Right: against the share of all "
    "tokens that are left, prefix included; there a blind choice of as many would lie just below the dashed diagonal."
)
MANY = (
    ", against the share of all tokens that are left, prefix included; a blind choice of as many would lie just below "
    "the dashed diagonal. A panel a series, all the others in grey behind it."
)


def caption(trials: pd.DataFrame) -> str:
    """What the figure of these trials shows, and which series it leaves out."""
    rows = trials[~trials["dense"] & trials["coverage"].notna()]
    here = np.array([same_patches(row, trials) for row in records_of(rows)], dtype=bool)
    shown, comparable = series(trials), set(rows["variant"][here])
    others = [name for name in dict.fromkeys(rows["variant"]) if name not in comparable]
    nothing = [name for name in dict.fromkeys(rows["variant"]) if name in comparable and name not in shown]
    left = ""
    for names, why in (
        (others, "its patches are not those of the full image"),
        (nothing, "no patch leaves its last block"),
    ):
        left += f" Not here, because {why}: {', '.join(name.replace('_', ' ') for name in names)}." if names else ""
    return CAPTION.format(where=MANY if len(shown) > panels.TOO_MANY else BOTH, left=left)


def series(trials: pd.DataFrame) -> list[str]:
    """The series that the figure shows: of the same patches as the others, and with any that survive."""
    return list(dict.fromkeys(_shown(trials)["variant"]))


def _shown(trials: pd.DataFrame) -> pd.DataFrame:
    rows = trials[~trials["dense"] & trials["coverage"].notna()]
    rows = rows[[same_patches(row, trials) for row in records_of(rows)]]
    survive = rows.groupby("variant", sort=False)["coverage"].transform("max") > 0
    return rows[survive]


@style.themed
def coverage(
    trials: pd.DataFrame,
    images: Mapping[str, pd.DataFrame],
    *,
    looks: Mapping[str, Look],
    title: str,
    subtitle: str,
    page: int = 0,
) -> Figure:
    """Coverage of the object's mask against GMACs and against the patches left, one curve a series."""
    rows = merge_seeds(_shown(trials))
    whole = _whole(trials)
    rows = rows.assign(left=[100 * _left(row, whole) for row in records_of(rows)])
    names = list(dict.fromkeys(rows["variant"]))
    if len(names) > panels.TOO_MANY:
        return _many(rows, panels.page(names, page), looks=looks, title=title, subtitle=subtitle)
    figure = style.new_figure(height=4.6)
    against_cost, against_left = figure.subplots(1, 2, sharey=True)
    for name in names:
        part = rows[rows["variant"] == name].sort_values("gmacs_mean", kind="stable")
        spread = list(zip(*(_half_widths(key, images) for key in part["key"]), strict=True))
        line = style.look_of(name, looks).line()
        for axes, x in ((against_cost, "gmacs_mean"), (against_left, "left")):
            axes.errorbar(part[x], 100 * part["coverage"], yerr=spread, elinewidth=1, capsize=2, label=name, **line)
    against_left.plot([0, 100], [0, 100], color=style.DENSE_COLOUR, linestyle="--", linewidth=1, gid="chance")
    against_cost.set(xlabel=style.GMACS, ylabel="object's patches that survive (%)", ylim=(0, 104))
    against_left.set(xlabel="all tokens that are left (%)", xlim=(0, 104))
    style.put_title(figure, title, subtitle)
    chance = Line2D([], [], color=style.DENSE_COLOUR, linestyle="--", linewidth=1, label="a blind choice")
    series = [style.handle(name, looks) for name in names]
    style.put_legend(figure, [*series, style.interval_handle(), chance])
    return style.finish(figure)


def same_patches(row: Mapping[str, Any], trials: pd.DataFrame) -> bool:
    """Whether a trial begins with all the patches that the others begin with: those of a smaller input are others."""
    first = max((tokens[0] for tokens in trials["tokens"] if len(tokens)), default=0)
    return not len(row["tokens"]) or row["tokens"][0] >= first


def _many(rows: pd.DataFrame, names: Sequence[str], *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """Against the patches left, a panel a series."""
    figure = panels.new_figure(len(names))
    grid = panels.subplots(figure, len(names))
    for axes, name in zip(grid, names, strict=True):
        for other, part in rows.groupby("variant", sort=False):
            part = part.sort_values("left")
            line = style.look_of(name, looks).line() | {"label": name} if other == name else panels.BEHIND
            axes.plot(part["left"], 100 * part["coverage"], **line)
        axes.plot([0, 100], [0, 100], color=style.DENSE_COLOUR, linestyle="--", linewidth=1, gid="chance")
        axes.set(xlim=(0, 104), ylim=(0, 104))
        panels.name_panel(axes, name)
    panels.share_limits(grid, "all tokens that are left (%)", "object's patches that survive (%)", figure)
    style.put_title(figure, title, subtitle)
    chance = Line2D([], [], color=style.DENSE_COLOUR, linestyle="--", linewidth=1, label="a blind choice")
    style.put_legend(figure, [panels.behind_handle(), chance])
    return style.finish(figure)


def _whole(trials: pd.DataFrame) -> float:
    """Tokens leaving the last block of the dense model, whose stages may merge patches; nan if no row tells."""
    return next((float(tokens[-1]) for tokens in trials.loc[trials["dense"], "tokens"] if len(tokens)), float("nan"))


def _left(row: Mapping[str, Any], whole: float) -> float:
    """Tokens leaving the last block as a share of those that leave it in the dense model or, where that is not known,
    of those entering the first (all with their prefix).
    """
    tokens = row["tokens"]
    if not len(tokens):
        return float("nan")
    return float(tokens[-1] / (tokens[0] if np.isnan(whole) else whole))


def _half_widths(key: str, images: Mapping[str, pd.DataFrame]) -> tuple[float, float]:
    """Points below and above the mean; nan, hence no bar, where the per-image table is missing."""
    if key not in images or "coverage" not in images[key]:
        return np.nan, np.nan
    known = images[key]["coverage"].dropna()
    if known.empty:
        return np.nan, np.nan
    interval = stats.bootstrap(known, draws=1000)
    return 100 * (interval.value - interval.low), 100 * (interval.high - interval.value)
