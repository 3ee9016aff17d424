"""Long lists of cases: a sample in ``make test``, all of them in ``make test-slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def sampled(names: Iterable[str], *, quick: Collection[str]) -> list[Any]:
    """All of the names; those that are not ``quick`` marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def methods_first(cases: Mapping[str, Any]) -> list[Any]:
    """All values of the cases under their names; variants of a method (their names have a space) marked slow, stacks
    not.
    """
    return [
        pytest.param(case, id=name, marks=[] if " " not in name or name.startswith("stack ") else pytest.mark.slow)
        for name, case in cases.items()
    ]
