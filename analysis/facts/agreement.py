"""How far methods keep the same patches, beyond what chance would give."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from analysis.facts.kept import last_kept, overlap
from analysis.facts.matching import NEAR, dense_gmacs, merge_seeds, without_seed
from analysis.frame import records_of, rows_of


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
        + ("" if not row.placement or "block" in row.variant or row.kind != "placement" else f", {row.placement}")
        for row in rows_of(rest)
    ]
    both = pd.concat([rows, rest.assign(variant=words)], ignore_index=True)
    made = [(without_seed(text), placement) for text, placement in zip(both["reducer"], both["placement"], strict=True)]
    return both[~pd.Series(made, index=both.index).duplicated()]


def matrix(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """Every pair of rows: first, second, jaccard, chance, kappa, keys; and the rows that left nothing to compare."""
    records = records_of(rows)
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
    for row in rows_of(pairs):
        values.loc[row.first, row.second] = values.loc[row.second, row.first] = row.kappa
    values = values.mask(np.eye(len(names), dtype=bool), 1.0)
    if len(names) > 2:
        apart = 1 - np.nan_to_num(values.to_numpy())
        np.fill_diagonal(apart, 0)
        order = leaves_list(linkage(squareform(apart, checks=False), method="average", optimal_ordering=True))
        values = values.iloc[order, order]
    return values
