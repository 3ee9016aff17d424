"""Which methods a search for the best placement may try, and what of each.

Told by a method's class (``TokenReducer.searchable``, ``budgets``, ``scheduled_as``) and by the traits of an instance;
who searches asks here and knows no method by name.
"""

from __future__ import annotations

import inspect
from typing import Any

from reducers.reducer import Searchable, TokenReducer

Method = TokenReducer | type[TokenReducer]


def why_no_candidate(method: Method, *, weights: bool = False, inputs: str = "images") -> str:
    """Why a method is not to be tried, in a few words; "" where it is.

    A class is told as its defaults are, an instance as it is set up: ``BackTracking(…, count_planning=False)`` is an
    oracle, ``TopK(…, score="random")`` a control. ``weights``: trained ones are at hand for what must be trained.
    ``inputs``: "images" or "clips", what is looked at.
    """
    traits = method.traits
    if traits.control:
        return "a control: methods are compared with it"
    if traits.oracle:
        return "an oracle: its cost leaves something out"
    if traits.trained and not weights:
        return "works only after training, and no weights are given"
    if inputs not in traits.inputs:
        return f"takes {' and '.join(traits.inputs)} and no {inputs}"
    if not budget_kinds(method):
        return "takes no budget, so that it cannot be set to a cost"
    return ""


def budget_kinds(method: Method) -> tuple[str, ...]:
    """The kinds of budget that mean something to a method, the natural one first: of "count", "ratio" and "drop".
    None where it takes no budget.
    """
    return method.budgets if any(setting.name == "budget" for setting in method.settings()) else ()


def takes_schedule(method: Method) -> bool:
    """Whether its counts may differ from block to block by a schedule."""
    return method.scheduled_as is not None and bool(budget_kinds(method))


def searchable_settings(method: Method) -> Searchable:
    """What of a method is worth trying: setting -> values as plain data, the default first (``build`` reads them)."""
    return method.searchable


def searchable_faults(method: type[TokenReducer]) -> list[str]:
    """What is wrong with a method's ``searchable``, for its tests: no setting of that name, or no default in front."""
    defaults: dict[str, Any] = {setting.name: setting.default for setting in method.settings()}
    faults = [f"it has no setting {name!r}" for name in method.searchable if name not in defaults]
    for name, values in method.searchable.items():
        default = defaults.get(name, inspect.Parameter.empty)
        if len(values) < 2 or len({repr(value) for value in values}) < len(values):
            faults.append(f"{name}: {values!r} are not several different values")
        elif name in defaults and (type(values[0]) is not type(default) or values[0] != default):
            faults.append(f"{name}: its default {default!r} does not come first")
    return faults
