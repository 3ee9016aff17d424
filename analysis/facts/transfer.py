"""At which budget a model was trained, and at which it was evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.frame import records_of, reducer_names

PLAIN = "off the shelf"


def trained_at(training: str) -> str:
    """The budget a training used, in words: "K = 108", "keep 0.7", "target 50 %"; "off the shelf" without one."""
    try:
        recipe = json.loads(training) if training else {}
    except ValueError:
        return training
    if not isinstance(recipe, Mapping) or not recipe:
        return PLAIN
    if isinstance(recipe.get("target"), int | float):
        return f"target {100 * recipe['target']:g} %"
    budget = _first_budget(recipe.get("stages"))
    if budget is None:
        return "dense"
    (kind, value), *_ = budget.items()
    return {"count": f"K = {value}", "ratio": f"keep {_number(value)}", "drop": f"r = {value}"}.get(
        kind, f"{kind} {value}"
    )


def _number(value: Any) -> str:
    """A ratio as text, fractions as decimals."""
    if isinstance(value, str) and "/" in value:
        top, bottom = value.split("/", 1)
        return f"{float(top) / float(bottom):.3g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _first_budget(stages: Any) -> dict[str, Any] | None:
    """The first budget anywhere in stages."""
    if isinstance(stages, Mapping):
        budget = stages.get("budget")
        if isinstance(budget, Mapping) and budget:
            order = [name for name in ("count", "ratio", "drop") if name in budget] or list(budget)
            return {order[0]: budget[order[0]]}
        stages = list(stages.values())
    if isinstance(stages, list):
        for part in stages:
            found = _first_budget(part)
            if found is not None:
                return found
    return None


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with ``method`` (as its variants begin, or else its reducers), ``trained`` (the budget) and
    ``home`` (evaluated at the cost that the training was aimed at, or with the very budget of the training).
    """
    own = [_at_home(row) for row in records_of(rows)]
    reducers = [" + ".join(reducer_names(text)) for text in rows["reducer"]]
    heads: dict[str, set[str]] = {}
    for name, variant in zip(reducers, rows["variant"], strict=True):
        heads.setdefault(name, set()).add(str(variant).partition(",")[0])
    spoken = {name: next(iter(found)) if len(found) == 1 else name for name, found in heads.items()}
    return rows.assign(
        method=[spoken[name] for name in reducers],
        trained=[trained_at(text) for text in rows["training"]],
        home=own,
    )


def _at_home(row: Mapping[Any, Any]) -> bool:
    """Whether a row was evaluated at the cost its training was aimed at, or else with the very budget of it."""
    try:
        recipe = json.loads(row["training"]) if row["training"] else {}
        if recipe and isinstance(recipe.get("target"), int | float):
            return not pd.isna(row["target"]) and bool(np.isclose(row["target"], recipe["target"]))
        return bool(recipe) and _first_budget(recipe.get("stages")) == _first_budget(json.loads(row["reducer"]))
    except ValueError:
        return False
