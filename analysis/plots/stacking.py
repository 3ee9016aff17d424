"""Does a second reducer on top of EViT pay? (Table A.5 of the ATS paper)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import stats, style
from analysis.frame import reducer_names
from analysis.matching import merge_seeds, paired
from analysis.plots.tradeoff import draw_curves, legend
from analysis.style import Look

CAPTION = (
    "Left: top-1 accuracy against multiply-adds as executed, with 95 % intervals. Right: each stack "
    "against {base} with the same budget: what it saves, and what it costs or brings in points of top-1, "
    "with the paired 95 % interval over the same images. A stack pays where the curve on the left lies "
    "above that of {base} at the same cost; saving alone is also to be had with a smaller budget."
)


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


def base_variant(trials: pd.DataFrame) -> str | None:
    """The series that stacks build on: a single reducer that the others contain, EViT before any other."""
    rows = trials[~trials["dense"]]
    parts = {v: set(reducer_names(r)) for v, r in zip(rows["variant"], rows["reducer"], strict=True)}
    alone = [name for name, used in parts.items() if len(used) == 1]
    inside = {name: sum(parts[name] < other for other in parts.values()) for name in alone}
    best = sorted((name for name in alone if inside[name]), key=lambda n: ("evit" not in parts[n], -inside[n]))
    return best[0] if best else None


def gains(trials: pd.DataFrame) -> list[Gain]:
    """Every stack against the base series at the same ``x``."""
    base = base_variant(trials)
    rows = merge_seeds(trials[~trials["dense"]])
    if base is None:
        return []
    alone = rows[rows["variant"] == base]
    found = []
    for row in rows[rows["variant"] != base].to_dict("records"):
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


@style.themed
def stacking(
    trials: pd.DataFrame,
    *,
    looks: Mapping[str, Look],
    title: str,
    subtitle: str,
) -> Figure:
    """Accuracy against GMACs, and the change each stack makes to its base with the same budget."""
    figure = style.new_figure(height=4.6)
    accuracy, change = figure.subplots(1, 2)
    names = draw_curves(accuracy, trials, looks=looks)
    found = gains(trials)
    for name in dict.fromkeys(gain.variant for gain in found):
        part = sorted((gain for gain in found if gain.variant == name), key=lambda gain: gain.saved)
        y = [100 * gain.difference for gain in part]
        pairs = [gain.paired for gain in part]
        low = [max(0.0, v - 100 * p.low) if p else np.nan for v, p in zip(y, pairs, strict=True)]
        high = [max(0.0, 100 * p.high - v) if p else np.nan for v, p in zip(y, pairs, strict=True)]
        change.errorbar(
            [100 * gain.saved for gain in part],
            y,
            yerr=[low, high],
            elinewidth=1,
            capsize=2,
            label=name,
            **style.look_of(name, looks).line(),
        )
    change.axhline(0, color=style.DENSE_COLOUR, linewidth=1)
    base = style.label(base_variant(trials) or "the base").replace("\n", " ")
    change.set(xlabel=f"GMACs saved against {base},\nsame budget (%)", ylabel="change in top-1 (points)")
    style.put_title(figure, title, subtitle)
    style.put_legend(figure, legend(names, looks, trials))
    return style.finish(figure)
