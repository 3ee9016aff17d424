"""Trials of the task ``embed``: how near features stay to the dense model's, told in tables and a sentence a cost.

No figure shows them, for every figure's axis is accuracy, and of that these trials say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ablations.records.paired import ALPHA, holm
from ablations.records.sign_flips import sign_flips
from analysis import style
from analysis.frame import ImageTables, Results, Setting, choosable, records_of
from analysis.tables import SHORT

NOTE = (
    "Cosine: between the pooled features of the reduced and of the dense model, the mean over images with Student's "
    "95 % interval; 1 is no change. It needs no labels, and says nothing of accuracy. All columns: "
)


@dataclass(frozen=True)
class FeatureTable:
    """What a spec found of features, in one setting."""

    spec: str
    anchor: str
    title: str
    about: str  # model and images
    findings: list[str]
    shown: pd.DataFrame  # texts
    numbers: pd.DataFrame


def feature_tables(results: Results) -> list[FeatureTable]:
    """A table for each setting and spec, in the order in which they were run."""
    settings = results.settings(results.features)
    found = []
    for setting in settings:
        rows = results.of(setting, rows=results.features)
        for spec in (name for name in results.specs if name in set(rows["spec"])):
            prefix = f"{setting.slug}-" if len(settings) > 1 else ""
            found.append(_table(results, setting, spec, rows[rows["spec"] == spec], prefix))
    return found


def _table(results: Results, setting: Setting, spec: str, rows: pd.DataFrame, prefix: str) -> FeatureTable:
    rows = rows.sort_values(["gmacs_mean", "cosine"], ascending=[True, False], kind="stable")
    share = rows["gmacs_mean"] / rows["dense_gmacs"]
    numbers = pd.DataFrame(
        {
            **{name: rows[name] for name in ("model", "variant", "x", "placement", "budget", "target", "seed")},
            "gmacs": rows["gmacs_mean"], "gmacs_std": rows["gmacs_std"], "share_of_dense": share,
            **{name: rows[name] for name in ("cosine", "cosine_low", "cosine_high", "reducer", "key")},
        }
    ).reset_index(drop=True)  # fmt: skip
    budgets = zip(rows["budget"], rows["x"], strict=True)
    bounds = rows[["cosine", "cosine_low", "cosine_high"]].to_numpy(dtype=float)
    shown = pd.DataFrame(
        {
            "method": [str(name).replace("_", " ") for name in rows["variant"]],
            "placement": rows["placement"].to_list(),
            "budget": [budget or (f"{x:g}" if pd.notna(x) else "") for budget, x in budgets],
            "GMACs": [style.cost(value) for value in rows["gmacs_mean"]],
            "share of dense (%)": [f"{100 * value:.1f}" for value in share],
            "cosine": [f"{value:.4f} [{low:.4f}, {high:.4f}]" for value, low, high in bounds],
            "trial": [key[:SHORT] for key in rows["key"]],
        }
    )
    title = str(results.about_specs.get(spec, {}).get("title") or spec.replace("_", " "))
    name = f"{prefix}{''.join(c if c.isalnum() or c in '_-' else '-' for c in spec)}-features"
    return FeatureTable(spec, name, title, style.describe(setting, rows), _leads(rows, results.images), shown, numbers)


def _leads(rows: pd.DataFrame, images: ImageTables) -> list[str]:
    """Who is nearest to the dense model at each cost that was aimed at, and who is told apart from it. Off the targets
    costs differ, and nearer is mostly dearer.
    """
    aimed = rows[rows["target_reached"].eq(True)]
    if aimed.empty:
        return []
    rows, found = choosable(aimed).drop_duplicates(["target", "variant"]), []
    for share, part in rows.groupby("target", sort=True):
        target: Any = share
        if len(part) < 2:
            continue
        ranked = records_of(part.sort_values("cosine", ascending=False, kind="stable"))
        lead, others = ranked[0], ranked[1:]
        p_values = holm([_p_value(images, str(lead["key"]), str(row["key"])) for row in others])
        same = [str(row["variant"]) for row, p in zip(others, p_values, strict=True) if not p < ALPHA]
        rest = f"not told apart from it: {', '.join(same)}" if same else "told apart from every other"
        found.append(
            f"At {100 * target:.0f} % of the dense cost: {lead['variant']}, cosine {lead['cosine']:.4f}; {rest} "
            f"(sign-flip test, Holm over {len(others)})."
        )
    return found


def _p_value(images: ImageTables, first: str, second: str) -> float:
    """Two-sided; 1 where the images of one are not there, or are others."""
    one, other = images.get(first), images.get(second)
    if one is None or other is None or list(one["image"]) != list(other["image"]):
        return 1.0
    difference = one["cosine"].to_numpy(dtype=np.float64) - other["cosine"].to_numpy(dtype=np.float64)
    return sign_flips(difference).either
