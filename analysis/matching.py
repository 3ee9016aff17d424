"""Which trials may be set beside each other: seeds of one computation, and trials of nearly the same cost."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.frame import NUMBERS

MATCH = 0.03  # trials within this share of the dense cost count as "the same cost"


def merge_seeds(trials: pd.DataFrame) -> pd.DataFrame:
    """One row for all seeds of the same computation: means, with ``keys`` (a list) and ``seeds`` (their
    number).

    Means are taken over trials on the same images, so the interval of the mean is that of the images: the
    mean of the bounds. It does not grow with the spread between seeds and is a little wide where seeds
    average out.
    """
    rows = trials.copy()
    rows["_stages"] = [_without_seed(text) for text in rows["reducer"]]
    same = ["spec", "variant", "x", "placement", "budget", "score", "target_gmacs", "finetuned", "_stages"]
    merged = []
    for _, group in rows.groupby(same, sort=False, dropna=False):
        # The seed nearest to the mean stands for all where one per-image table is needed.
        first = group.loc[(group["top1"] - group["top1"].mean()).abs().fillna(0).idxmin()].copy()
        for name in NUMBERS:
            first[name] = group[name].mean()
        for name in ("tokens", "tokens_std"):
            lists = [value for value in group[name] if len(value)]
            first[name] = list(np.mean(lists, axis=0)) if lists and len({len(v) for v in lists}) == 1 else []
        first["keys"] = list(group["key"])
        first["seeds"] = len(group)
        merged.append(first)
    if not merged:
        return rows.drop(columns="_stages").assign(keys=[], seeds=[])
    return pd.DataFrame(merged).drop(columns="_stages").reset_index(drop=True)


def cost_levels(trials: pd.DataFrame, *, by: str, count: int = 4) -> list[float]:
    """GMACs at which as many groups as possible have a trial, at least two, cheapest first; [] with a single
    group.
    """
    rows = trials[~trials["dense"]]
    if rows[by].nunique() < 2:
        return []
    width = MATCH * dense_gmacs(trials)
    costs = np.sort(rows["gmacs_mean"].to_numpy())
    groups = [np.asarray(group["gmacs_mean"]) for _, group in rows.groupby(by, sort=False)]
    away = np.array([[np.abs(group - cost).min() for group in groups] for cost in costs])  # (costs, groups)
    near = away <= width
    rank = sorted(range(len(costs)), key=lambda i: (-near[i].sum(), np.minimum(away[i], width).sum()))
    levels: list[float] = []
    for i in rank:
        if near[i].sum() >= 2 and all(abs(costs[i] - level) > 1.5 * width for level in levels):
            levels.append(float(costs[i]))
    return sorted(levels[:count])


def at_cost(trials: pd.DataFrame, level: float, *, by: str) -> pd.DataFrame:
    """The trial of each group nearest to a cost, where one lies within ``MATCH`` of the dense cost."""
    rows = trials[~trials["dense"]].assign(_away=lambda r: (r["gmacs_mean"] - level).abs())
    rows = rows[rows["_away"] <= MATCH * dense_gmacs(trials)]
    return rows.sort_values("_away", kind="stable").groupby(by, sort=False).head(1).drop(columns="_away")


def dense_gmacs(trials: pd.DataFrame) -> float:
    """Cost of the plain model; of the dearest trial where no row says it."""
    known = trials["dense_gmacs"].dropna()
    return float(known.iloc[0]) if len(known) else float(trials["gmacs_mean"].max())


def _without_seed(stages: str) -> str:
    def strip(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: strip(part) for key, part in value.items() if key != "seed"}
        return [strip(part) for part in value] if isinstance(value, list) else value

    try:
        return json.dumps(strip(json.loads(stages)), sort_keys=True)
    except (TypeError, ValueError):
        return stages
