"""Do methods keep the same patches? Agreement between them at equal cost, beyond what chance would give."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from analysis import style
from analysis.kept import last_kept, overlap

CAPTION = (
    "Agreement about which patches still have a token of their own after the last block, at {level}: Cohen's kappa, "
    "mean over images. 0 is what two random choices of as many patches would have, 1 the same choice; similar methods "
    "stand side by side. Of a merged group its heaviest member counts as kept. Jaccard's index and its value by chance "
    "are in the table.{left}"
)
ANNOTATED = 16  # methods up to which the numbers fit into the cells


def matrix(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """Every pair of rows: first, second, jaccard, chance, kappa, keys; and the rows that left nothing to compare."""
    read = {row["variant"]: (row["key"], last_kept(images, row["key"])) for row in rows.to_dict("records")}
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
    names = [style.label(name) for name in values.index]
    count = len(names)
    figure = style.new_figure(height=min(7.4, 2.0 + 0.36 * count + 0.6))
    axes = figure.subplots()
    shown = np.ma.masked_array(values.to_numpy(), mask=np.triu(np.ones((count, count), dtype=bool)))
    shown = shown[1:, :-1]
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    small = 8.5 if count <= 12 else 7.2
    axes.set_xticks(range(count - 1), names[:-1], rotation=45, ha="right", rotation_mode="anchor", fontsize=small)
    axes.set_yticks(range(count - 1), names[1:], fontsize=small)
    axes.grid(visible=False)
    for i in range(count - 1):
        for j in range(i + 1):
            value = values.iloc[i + 1, j]
            if count <= ANNOTATED and not np.isnan(value):
                colour = "white" if value > 0.55 else "#222222"
                text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
                axes.text(j, i, text, ha="center", va="center", fontsize=small, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Cohen's kappa (0: chance)")
    style.put_title(figure, title, subtitle)
    return style.finish(figure)
