"""Trials of the tasks ``embed`` and ``dense``: what becomes of the features, told in tables and a sentence a cost.

No figure shows them, for every figure's axis is accuracy, and they are asked for another measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ablations.records.paired import ALPHA, holm
from ablations.records.patch_iou import swaps
from ablations.records.sign_flips import sign_flips
from analysis import style
from analysis.frame import MEASURED, ImageTables, Results, Setting, choosable, records_of
from analysis.tables import SHORT


@dataclass(frozen=True)
class Measure:
    """How a task's trials are told."""

    task: str
    name: str  # of the measure, for people
    written: Callable[[float], str]
    p_value: Callable[[pd.DataFrame, pd.DataFrame], float]  # two-sided, of two trials' images
    test: str
    note: str

    @property
    def column(self) -> str:
        return MEASURED[self.task]


def _cosines_differ(one: pd.DataFrame, other: pd.DataFrame) -> float:
    return sign_flips(one["cosine"].to_numpy(dtype=np.float64) - other["cosine"].to_numpy(dtype=np.float64)).either


def _patches_differ(one: pd.DataFrame, other: pd.DataFrame) -> float:
    first, second = _counted(one), _counted(other)
    return min(1.0, 2 * min(swaps(first, second), swaps(second, first)))


def _counted(images: pd.DataFrame) -> np.ndarray:
    parts = [np.stack(images[name].to_list()).astype(np.float64) for name in ("intersection", "union")]
    return np.concatenate(parts, axis=1)


MEASURES = (
    Measure(
        "embed", "cosine", "{:.4f}".format, _cosines_differ, "sign-flip test",
        "Cosine: between the pooled features of the reduced and of the dense model, the mean over images with "
        "Student's 95 % interval; 1 is no change. It needs no labels, and says nothing of accuracy. All columns: ",
    ),
    Measure(
        "dense", "mIoU (%)", lambda value: f"{100 * value:.1f}", _patches_differ, "swap test",
        "mIoU: of patches against the masks of what decides, the mean over the classes and the background, by a linear "
        "head fitted on the dense model's map; interval of resampled images. All columns: ",
    ),
)  # fmt: skip


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
    task: str
    note: str


def feature_tables(results: Results) -> list[FeatureTable]:
    """A table for each task, setting and spec, in the order in which they were run."""
    found = []
    for measure in MEASURES:
        asked = results.features[results.features["task"] == measure.task]
        settings = results.settings(asked)
        for setting in settings:
            rows = results.of(setting, rows=asked)
            for spec in (name for name in results.specs if name in set(rows["spec"])):
                prefix = f"{setting.slug}-" if len(settings) > 1 else ""
                found.append(_table(results, setting, spec, rows[rows["spec"] == spec], prefix, measure))
    return found


def _table(
    results: Results, setting: Setting, spec: str, rows: pd.DataFrame, prefix: str, measure: Measure
) -> FeatureTable:
    column = measure.column
    restored = ("restore", "background_iou", "top1") if measure.task == "dense" else ()
    rows = rows.sort_values(["gmacs_mean", column], ascending=[True, False], kind="stable")
    share = rows["gmacs_mean"] / rows["dense_gmacs"]
    numbers = pd.DataFrame(
        {
            **{name: rows[name] for name in ("model", "variant", "x", "placement", "budget", "target", "seed")},
            "gmacs": rows["gmacs_mean"], "gmacs_std": rows["gmacs_std"], "share_of_dense": share,
            **{name: rows[name] for name in (column, f"{column}_low", f"{column}_high", *restored, "reducer", "key")},
        }
    ).reset_index(drop=True)  # fmt: skip
    budgets = zip(rows["budget"], rows["x"], strict=True)
    bounds = rows[[column, f"{column}_low", f"{column}_high"]].to_numpy(dtype=float)
    write = measure.written
    shown = pd.DataFrame(
        {
            "method": [str(name).replace("_", " ") for name in rows["variant"]],
            "placement": rows["placement"].to_list(),
            "budget": [budget or (f"{x:g}" if pd.notna(x) else "") for budget, x in budgets],
            "GMACs": [style.cost(value) for value in rows["gmacs_mean"]],
            "share of dense (%)": [f"{100 * value:.1f}" for value in share],
            **({"restore": rows["restore"].to_list()} if restored else {}),
            measure.name: [f"{write(value)} [{write(low)}, {write(high)}]" for value, low, high in bounds],
            "trial": [key[:SHORT] for key in rows["key"]],
        }
    )
    title = str(results.about_specs.get(spec, {}).get("title") or spec.replace("_", " "))
    name = f"{prefix}{''.join(c if c.isalnum() or c in '_-' else '-' for c in spec)}"
    return FeatureTable(
        spec, f"{name}-{'patches' if restored else 'features'}", title, style.describe(setting, rows),
        _leads(rows, results.images, measure), shown, numbers, measure.task, measure.note,
    )  # fmt: skip


def _leads(rows: pd.DataFrame, images: ImageTables, measure: Measure) -> list[str]:
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
        ranked = records_of(part.sort_values(measure.column, ascending=False, kind="stable"))
        lead, others = ranked[0], ranked[1:]
        p_values = holm([_p_value(images, str(lead["key"]), str(row["key"]), measure) for row in others])
        same = [str(row["variant"]) for row, p in zip(others, p_values, strict=True) if not p < ALPHA]
        rest = f"not told apart from it: {', '.join(same)}" if same else "told apart from every other"
        lead_value = measure.written(lead[measure.column])
        found.append(
            f"At {100 * target:.0f} % of the dense cost: {lead['variant']}, {measure.name} {lead_value}; {rest} "
            f"({measure.test}, Holm over {len(others)})."
        )
    return found


def _p_value(images: ImageTables, first: str, second: str, measure: Measure) -> float:
    """Two-sided; 1 where the images of one are not there, or are others."""
    one, other = images.get(first), images.get(second)
    if one is None or other is None or list(one["image"]) != list(other["image"]):
        return 1.0
    return measure.p_value(one, other)
