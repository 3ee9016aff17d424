"""The registry: a method's name, and from plain data to a reducer and back."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from reducers.budget import parse_budget
from reducers.errors import ReducerError
from reducers.reducer import TokenReducer

_METHODS: dict[str, type[TokenReducer]] = {}
R = TypeVar("R", bound=type[TokenReducer])


def register(name: str) -> Callable[[R], R]:
    """Class decorator: make a reducer known under a lower-case name."""

    def add(cls: R) -> R:
        if name in _METHODS or name != name.lower() or not name.isidentifier():
            raise ReducerError(f"cannot register {name!r}: names are unique lower-case identifiers")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def available() -> dict[str, type[TokenReducer]]:
    """The registered methods by name (a stack is a composition of methods, not one of them)."""
    return {name: cls for name, cls in sorted(_METHODS.items()) if name != "stack"}


def build(data: dict[str, Any]) -> TokenReducer:
    """Make a reducer from plain data, e.g. ``{"name": "ats", "budget": {"count": 108}}``; nested reducers likewise."""
    if not isinstance(data, dict) or "name" not in data:
        raise ReducerError(f'a reducer is written {{"name": "ats", "budget": {{"count": 108}}}}; got {data!r}')
    name = data["name"]
    if not isinstance(name, str) or name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ReducerError(f"unknown reducer {name!r}{hint} Registered: {', '.join(sorted(_METHODS))}")
    cls = _METHODS[name]
    parameters = {p.name: p for p in cls.settings()}
    arguments: dict[str, Any] = {}
    for key, value in data.items():
        if key == "name":
            continue
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            known += "; a schedule is read with its stage, by placement_from()" * (key == "schedule")
            raise ReducerError(f"reducer {name!r} has no setting {key!r}; it has {known}")
        if key == "budget":
            value = parse_budget(value)
        elif isinstance(value, dict) and "name" in value:
            value = build(value)
        elif isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
            value = [build(part) for part in value]
        arguments[key] = value
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ReducerError(f"reducer {name!r} needs {', '.join(missing)}")
    return cls(**arguments)
