"""Do plain images keep fewer tokens? The rank correlation of tokens with clutter for every method, tested, not
illustrated. Where clutter is not known (photographs), with how hard the plain model finds an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import stats, style
from analysis.style import Look

CAPTION = (
    "Spearman's rank correlation over images of {counted} with {what}, with 95 % intervals (Bonett and Wright), for "
    "every method that lets the number differ. Right of zero: {more} images keep fewer tokens. Filled: the interval "
    "excludes zero after Bonferroni's correction; hollow: it does not. {level}.{fixed}"
)
CLUTTER = "the known amount of clutter in it"
HARDNESS = "the plain model's loss on it (how hard it is)"


@dataclass(frozen=True)
class Counted:
    """How an image's tokens are counted: one way for all the methods of a figure, and what the figure calls it."""

    label: str  # of an axis
    words: str  # in a sentence
    of: Callable[[np.ndarray], np.ndarray]  # (images, blocks + 1) -> (images,)


LAST = Counted("tokens leaving the last block", "the tokens that leave the last block", lambda counts: counts[:, -1])
MEAN = Counted(
    "tokens in a block, mean over all blocks",
    "the tokens an image has in a block, mean over all blocks",
    lambda counts: counts[:, :-1].mean(axis=1),
)


def tokens_kept(table: pd.DataFrame, counted: Counted) -> np.ndarray:
    """One number of tokens an image, prefix included."""
    return counted.of(np.stack(table["tokens"].to_list()).astype(float))


def adapts(table: pd.DataFrame) -> bool:
    """Whether images differ in their tokens, in any block."""
    return len(table) > 1 and bool(np.ptp(np.stack(table["tokens"].to_list()), axis=0).any())


def counting(tables: Iterable[pd.DataFrame]) -> Counted:
    """What to count so that every method that adapts is seen to: the last block's tokens, or the mean over all blocks
    where one of them ends with as many tokens in every image.
    """
    adaptive = [table for table in tables if adapts(table)]
    return LAST if all(np.ptp(tokens_kept(table, LAST)) > 0 for table in adaptive) else MEAN


def known(tables: list[pd.DataFrame], column: str) -> bool:
    return bool(tables) and all(
        column in table and table[column].notna().all() and table[column].nunique() > 1 for table in tables
    )


def hardness(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.Series | None:
    """The plain model's loss by image name, from its own trial or from one that removed no token of any image; None
    where there is none.
    """
    whole = [len(row) > 1 and np.ptp(np.asarray(row, dtype=float)) == 0 for row in trials["tokens"]]
    candidates = [*trials.loc[trials["dense"], "key"], *trials.loc[np.array(whole, dtype=bool), "key"]]
    for key in candidates:
        if key in images and known([images[key]], "loss") and _like_dense(images[key]):
            return images[key].set_index("image")["loss"]
    return None


def _like_dense(table: pd.DataFrame) -> bool:
    """Whether a trial answered every image as the plain model did, as far as that is known."""
    return "dense_correct" not in table or bool((table["correct"] == table["dense_correct"]).all())


def question(what: str) -> str:
    """What the correlation answers: loss is no measure of how plain an image is."""
    return "Do plain images keep fewer tokens?" if what == CLUTTER else "Do easy images keep fewer tokens?"


def correlations(
    rows: pd.DataFrame, images: Mapping[str, pd.DataFrame], hard: pd.Series | None = None
) -> tuple[pd.DataFrame, str]:
    """One line a method: variant, rho, low, high, clear (Bonferroni over the methods), gmacs, key; rho is nan for a
    method that keeps as many tokens in every image. And with what tokens were correlated; "" where nothing is known.
    """
    have = [(row, images[row["key"]]) for row in rows.to_dict("records") if row["key"] in images]
    have = [(row, table) for row, table in have if "tokens" in table and len(table) > 3]
    tables = [table for _, table in have]
    if not tables:
        return pd.DataFrame(), ""
    if known(tables, "clutter"):
        what = CLUTTER
    elif hard is not None:
        what = HARDNESS
    else:
        return pd.DataFrame(), ""
    counted = counting(tables)
    differ = [bool(np.ptp(tokens_kept(table, counted)) > 0) for table in tables]
    strict = 1 - (1 - stats.LEVEL) / max(1, sum(differ))
    found = []
    for (row, table), varies in zip(have, differ, strict=True):
        other = table["clutter"] if what == CLUTTER else table["image"].map(hard)
        use = other.notna().to_numpy()
        a, b = tokens_kept(table, counted)[use], other.to_numpy(dtype=float)[use]
        rho = stats.spearman(a, b) if varies else stats.Interval(np.nan, np.nan, np.nan)
        wide = stats.spearman(a, b, level=strict) if varies else rho
        clear = bool(wide.low > 0 or wide.high < 0)
        found.append({"variant": row["variant"], "rho": rho.value, "low": rho.low, "high": rho.high, "clear": clear,
                      "gmacs": row["gmacs_mean"], "images": int(use.sum()), "counted": counted.words,
                      "key": row["key"]})  # fmt: skip
    return pd.DataFrame(found), what


def caption(found: pd.DataFrame, what: str, level: str) -> str:
    fixed = [name.replace("_", " ") for name in found.loc[found["rho"].isna(), "variant"]]
    text = f" The same number in every image, hence no correlation: {', '.join(fixed)}." if fixed else ""
    more = "plainer" if what == CLUTTER else "easier"
    return CAPTION.format(what=what, counted=found["counted"].iloc[0], level=level, fixed=text, more=more)


@style.themed
def clutter(found: pd.DataFrame, what: str, *, looks: Mapping[str, Look], title: str, subtitle: str) -> Figure:
    """A forest plot: one line a method, strongest correlation on top."""
    rows = found[found["rho"].notna()].sort_values("rho", kind="stable")
    figure = style.new_figure(height=max(2.6, 1.7 + 0.27 * len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows.itertuples()):
        look = style.look_of(row.variant, looks)
        axes.plot([row.low, row.high], [place, place], color=look.colour, linewidth=1.8, gid="interval")
        face = look.colour if row.clear else "white"
        axes.plot([row.rho], [place], marker=look.marker, markersize=7, linestyle="none", markeredgecolor=look.colour,
                  markerfacecolor=face, label=row.variant)  # fmt: skip
    axes.axvline(0, color=style.DENSE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(rows)), [style.label(name) for name in rows["variant"]], fontsize=9)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    bound = min(1.0, 1.08 * float(np.nanmax(np.abs(rows[["low", "high"]].to_numpy()))))
    axes.set_xlim(min(-0.15, -bound if rows["low"].min() < -0.15 else -0.15), max(0.15, bound))
    words = "clutter" if what == CLUTTER else "the plain model's loss"
    tokens = next(one.label for one in (LAST, MEAN) if one.words == found["counted"].iloc[0])
    axes.set_xlabel(f"rank correlation (Spearman's rho) of\n{tokens}, with {words}")
    style.put_title(figure, title, subtitle)
    common: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": style.GREY, "markersize": 6}
    signs = [(rows["clear"].any(), "interval excludes 0 (Bonferroni)", style.GREY),
             ((~rows["clear"]).any(), "it does not", "white")]  # fmt: skip
    handles = [Line2D([], [], label=text, **common, markerfacecolor=face) for drawn, text, face in signs if drawn]
    handles.append(Line2D([], [], color=style.GREY, linewidth=1.8, label="95 % interval over images"))
    style.put_legend(figure, handles)
    return style.finish(figure)
