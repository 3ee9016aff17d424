"""One training, many budgets: a model finetuned at one budget and evaluated at others without retraining."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.frame import reducer_names
from analysis.matching import merge_seeds
from analysis.plots.tradeoff import draw_reference, draw_seeds

CAPTION = (
    "Top-1 accuracy against the multiply-adds of evaluation, one curve for each budget the model was finetuned at, and "
    "in grey without finetuning; a panel a method. Large rings: evaluated at the budget it was trained for. A curve "
    "that stays beside the rings of the others was trained once for all of them. Bars are 95 % intervals over images, "
    "small circles single training seeds."
)
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


def labelled(trials: pd.DataFrame) -> pd.DataFrame:
    """Rows with seeds merged, ``method`` (as its variants begin, or else its reducers), ``trained`` (the budget) and
    ``home`` (evaluated at the cost that the training was aimed at, or with the very budget of the training).
    """
    rows = merge_seeds(trials[~trials["dense"]])
    own = [_at_home(row) for row in rows.to_dict("records")]
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


@style.themed
def transfer(trials: pd.DataFrame, *, title: str, subtitle: str) -> Figure:
    """A panel a method: accuracy against cost for each budget of training."""
    rows = labelled(trials)
    methods = list(dict.fromkeys(rows["method"]))
    kinds = [kind for kind in dict.fromkeys(rows["trained"]) if kind != PLAIN]
    looks = {kind: style.look(slot) for slot, kind in enumerate(kinds)}
    figure = style.new_figure(height=4.5 if len(methods) < 3 else 7.2)
    columns = min(2, len(methods))
    grid = figure.subplots(-(-len(methods) // columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes in list(grid.flat)[len(methods) :]:
        axes.remove()
    for axes, method in zip(grid.flat, methods, strict=False):
        for kind, part in rows[rows["method"] == method].groupby("trained", sort=False):
            part = part.sort_values("gmacs_mean", kind="stable")
            line = looks[kind].line() if kind in looks else {"color": "#8d8d8d", "marker": "x", "linestyle": ":"}
            top1 = 100 * part["top1"]
            bars = np.clip([top1 - 100 * part["top1_low"], 100 * part["top1_high"] - top1], 0, None)
            axes.errorbar(part["gmacs_mean"], top1, yerr=bars, elinewidth=1, capsize=2, label=str(kind), **line)
            draw_seeds(axes, part["gmacs_mean"], part, colour=line["color"])
            home = part[part["home"]]
            ring: dict[str, Any] = {
                "linestyle": "none",
                "marker": "o",
                "markersize": 13,
                "markerfacecolor": "none",
                "gid": "home",
            }
            ring |= {"markeredgecolor": line["color"], "markeredgewidth": 1.4}
            axes.plot(home["gmacs_mean"], 100 * home["top1"], **ring)
        draw_reference(axes, trials, at_cost=False)
        axes.set_title(method)
        axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
        axes.label_outer()
    style.put_title(figure, title, subtitle)
    handles = [style.handle(kind, looks) for kind in kinds]
    for handle, kind in zip(handles, kinds, strict=True):
        handle.set_label(f"finetuned at {kind}")
    if PLAIN in set(rows["trained"]):
        handles.append(style.plain_handle(PLAIN))
    home_handle = Line2D([], [], linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=style.GREY)
    home_handle.set_label("evaluated at the budget of its training")
    handles += [home_handle, style.interval_handle(), *([style.seeds_handle()] if (rows["seeds"] > 1).any() else [])]
    style.put_legend(figure, [*handles, style.dense_handle(star=False)])
    return style.finish(figure)
