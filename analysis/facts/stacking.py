"""What a stack of two reducers changes about the one it builds on."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis import stats
from analysis.facts.matching import paired
from analysis.frame import records_of, reducer_names


@dataclass(frozen=True)
class Gain:
    """A stack against its base with the same budget: shares of the base's cost and differences in accuracy, 0
    .. 1.
    """

    variant: str
    x: float | None
    key: str
    base_key: str
    saved: float
    difference: float
    paired: stats.Paired | None  # None where the per-image tables are missing


def base_variant(rows: pd.DataFrame) -> str | None:
    """The series that stacks build on: a single reducer that the others contain, EViT before any other."""
    parts = {v: set(reducer_names(r)) for v, r in zip(rows["variant"], rows["reducer"], strict=True)}
    alone = [name for name, used in parts.items() if len(used) == 1]
    inside = {name: sum(parts[name] < other for other in parts.values()) for name in alone}
    best = sorted((name for name in alone if inside[name]), key=lambda n: ("evit" not in parts[n], -inside[n]))
    return best[0] if best else None


def gains(rows: pd.DataFrame, base: str | None) -> list[Gain]:
    """Every stack against the base series at the same ``x``."""
    if base is None:
        return []
    alone = rows[rows["variant"] == base]
    found = []
    for row in records_of(rows[rows["variant"] != base]):
        # Without a number the words of the budget must be the same: both being without one says nothing.
        unknown = alone["x"].isna() & (alone["budget"] == row["budget"]) & (alone["budget"] != "")
        same = alone[unknown] if pd.isna(row["x"]) else alone[(alone["x"] - row["x"]).abs() < 1e-9]
        if len(same):
            other = same.iloc[0]
            x = None if pd.isna(row["x"]) else float(row["x"])
            found.append(
                Gain(
                    row["variant"],
                    x,
                    row["key"],
                    other["key"],
                    1 - row["gmacs_mean"] / other["gmacs_mean"],
                    float(row["top1"] - other["top1"]),
                    paired(row, other.to_dict()),
                )
            )
    return found
