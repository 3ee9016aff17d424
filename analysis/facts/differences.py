"""Every series of a spec against one of them, at equal cost."""

from __future__ import annotations

import pandas as pd

from analysis.facts.comparison import Versus, versus, versus_curve
from analysis.facts.matching import cost_levels, cut, targets


def reference_of(rows: pd.DataFrame) -> str | None:
    """The series to compare with: the first of the spec that meets others at most of the costs, random choice and
    the dense model aside.
    """
    levels = cost_levels(rows, by="variant", count=8)
    met: dict[str, int] = {}
    for level in levels:
        for name in cut(rows, level, by="variant").rows["variant"]:
            met[name] = met.get(name, 0) + 1
    names = [n for n in dict.fromkeys(rows["variant"]) if met.get(n, 0) and not n.casefold().startswith("random")]
    return next((name for name in names if met[name] >= 0.75 * max(met[n] for n in names)), None)


def find(rows: pd.DataFrame, reference: str | None = None) -> list[Versus]:
    """What the figure of a spec shows; [] where nothing meets at a common cost or the answers are not known. In results
    that were not calibrated, a reference that is a curve is met by every trial at that trial's own cost.
    """
    name = reference_of(rows) if reference is None else reference
    if name is None:
        return []
    curve = rows[rows["variant"] == name]
    if not targets(rows) and reference is not None and len(curve) > 2:
        return versus_curve(rows, name, by="variant")
    return versus(rows, name, by="variant")
