"""Do methods keep the same patches? Agreement between them at equal cost, beyond what chance would give."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from analysis import style
from analysis.kept import last_kept, overlap
from analysis.matching import NEAR, dense_gmacs, merge_seeds, without_seed

CAPTION = (
    "Agreement about which patches still have a token of their own after the last block, at {level}: Cohen's kappa, "
    "mean over images. 0 is what two random choices of as many patches would have, 1 the same choice; columns bear the "
    "numbers of the rows; similar methods stand side by side. Of a merged group its heaviest member counts as kept. "
    "Jaccard's index and its value by chance are in the table.{left}"
)
ANNOTATED = 28  # methods up to which the numbers fit into the cells


def across_specs(trials: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` (of one spec), and every other spec's trials at their cost: each computation once, under the name of
    the first spec that has it, which stands before the name for all specs but that of ``rows``.
    """
    dense, level = dense_gmacs(trials), float(rows["gmacs_mean"].median())
    own = rows["spec"].iloc[0]
    rest = merge_seeds(trials[~trials["dense"] & (trials["spec"] != own)])
    away = (rest["gmacs_mean"] - level).abs()
    # the column first: pandas lets a column that is put into an empty table make rows of nothing
    rest = rest.assign(_away=away)[away <= NEAR * dense].sort_values("_away", kind="stable")
    rest = rest.drop_duplicates(["spec", "variant", "placement"]).sort_index()
    words = [
        f"{row.spec.replace('_', ' ')}: {row.variant}"
        + ("" if not row.placement or "block" in row.variant or row.spec != "stage_placement" else f", {row.placement}")
        for row in rest.itertuples()
    ]
    both = pd.concat([rows, rest.assign(variant=words)], ignore_index=True)
    made = [(without_seed(text), placement) for text, placement in zip(both["reducer"], both["placement"], strict=True)]
    return both[~pd.Series(made, index=both.index).duplicated()]


def matrix(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """Every pair of rows: first, second, jaccard, chance, kappa, keys; and the rows that left nothing to compare."""
    records = rows.to_dict("records")
    read = {row["variant"]: (row["key"], last_kept(images, row["key"])) for row in records}
    # A smaller input has patches of its own: its numbers mean other places.
    most = max((row["tokens"][0] for row in records if len(row["tokens"])), default=0)
    read |= {row["variant"]: (row["key"], None) for row in records if len(row["tokens"]) and row["tokens"][0] < most}
    # One number of patches for all: a method that reduces in the first block never shows the full grid.
    patches = max((found[1] for _, found in read.values() if found is not None), default=0)
    bits, left = {}, []
    for name, (key, found) in read.items():
        kept = None if found is None else found[0][:, :patches]
        if kept is None or not ((kept.sum(axis=1) > 0) & (kept.sum(axis=1) < patches)).any():
            left.append(name)
        else:
            bits[name] = (key, kept)
    names = list(bits)
    pairs = []
    for i, first in enumerate(names):
        for second in names[i:]:
            (key, a), (other, b) = bits[first], bits[second]
            if a.shape == b.shape:
                pairs.append({"first": first, "second": second, **overlap(a, b), "keys": f"{key} {other}"})
    columns = ["first", "second", "jaccard", "chance", "kappa", "keys"]
    return pd.DataFrame(pairs, columns=columns), left


def square(pairs: pd.DataFrame) -> pd.DataFrame:
    """Kappa as a symmetric matrix, similar methods next to each other."""
    names = list(dict.fromkeys([*pairs["first"], *pairs["second"]]))
    values = pd.DataFrame(np.nan, index=names, columns=names)
    for row in pairs.itertuples():
        values.loc[row.first, row.second] = values.loc[row.second, row.first] = row.kappa
    values = values.mask(np.eye(len(names), dtype=bool), 1.0)
    if len(names) > 2:
        apart = 1 - np.nan_to_num(values.to_numpy())
        np.fill_diagonal(apart, 0)
        order = leaves_list(linkage(squareform(apart, checks=False), method="average", optimal_ordering=True))
        values = values.iloc[order, order]
    return values


@style.themed
def agreement(pairs: pd.DataFrame, *, title: str, subtitle: str) -> Figure:
    """Kappa as a heat map: the lower triangle, the names beside it."""
    values = square(pairs)
    names = [_tick(name, i + 1) for i, name in enumerate(values.index)]
    count, lines = len(names), sum(name.count("\n") + 1 for name in names)
    figure = style.new_figure(height=min(8.6, 1.7 + max(0.27 * count, 0.17 * lines)))
    axes = figure.subplots()
    shown = np.ma.masked_array(values.to_numpy(), mask=np.triu(np.ones((count, count), dtype=bool)))
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    small = 8.5 if count <= 12 else 7.5
    # Numbers name the columns: slanted names take more room than the cells, and collide where there are many.
    axes.set_xticks(range(count), [str(i + 1) for i in range(count)], fontsize=small)
    axes.set_yticks(range(count), names, fontsize=small)
    axes.grid(visible=False)
    for i in range(count):
        for j in range(i):
            value = values.iloc[i, j]
            if count <= ANNOTATED and not np.isnan(value):
                colour = "white" if value > 0.55 else "#222222"
                axes.text(
                    j, i, _digits(value), ha="center", va="center", fontsize=min(small, 115 / count), color=colour
                )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Cohen's kappa (0: chance)")
    style.put_title(figure, title, subtitle)
    return style.finish(figure)


def _tick(name: str, number: int) -> str:
    """A row's name and number; a long name goes over two lines, its blocks stay together."""
    held = re.sub(r"\(.*?\)|blocks? [\d, -]+", lambda found: found.group().replace(" ", "\u00a0"), name)
    return "\n".join(_wrap(f"{held.replace('_', ' ')}\u2002{number}", 32))


def _wrap(text: str, width: int) -> list[str]:
    """Lines broken at ordinary spaces alone (``textwrap`` breaks at others too)."""
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}".strip(" ")
        if len(line) <= width or not lines[-1]:
            lines[-1] = line
        else:
            lines.append(word)
    return lines


def _digits(value: float) -> str:
    """Kappa in as little room as two decimals take: ".47", "1.00"."""
    text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text
