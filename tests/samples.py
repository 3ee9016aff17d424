"""Long lists of cases: a sample in ``make test``, all of them in ``make test-slow``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from zlib import crc32

import pytest

from reducers import available


def reading(kind: str) -> list[str]:
    """The registered methods that read ``"images"``, or ``"clips"``."""
    return [name for name, method in available().items() if kind in method.traits.inputs]


def sampled(names: Iterable[Any], *, quick: Collection[Any]) -> list[Any]:
    """All of the names; those that are not ``quick`` marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def shared_out(cases: Iterable[Any], *, of: int = 2) -> list[Any]:
    """All of the cases; one in ``of`` of them quick, from the first on, the others marked slow."""
    return [case if place % of == 0 else pytest.param(case, marks=pytest.mark.slow) for place, case in enumerate(cases)]


def methods_first(cases: Mapping[str, Any]) -> list[Any]:
    """All values of the cases under their names; variants of a method (their names have a
    space) marked slow, stacks not.
    """
    return [
        pytest.param(case, id=name, marks=[] if " " not in name or name.startswith("stack ") else pytest.mark.slow)
        for name, case in cases.items()
    ]


def in_turn(cases: Mapping[str, Any], *, of: int = 3) -> Callable[[Any], Any]:
    """A decorator: the test gets one in ``of`` of the methods and of the stacks in ``make test``, which ones follows
    from its name, so that several tests together see them all; in ``make test-slow`` it gets the others, and variants.
    """

    def decorate(test: Any) -> Any:
        chosen = [case for case in methods_first(cases) if not case.marks]
        quick = {case.id for case in chosen[crc32(test.__name__.encode()) % of :: of]}
        found = [
            pytest.param(case, id=name, marks=[] if name in quick else pytest.mark.slow) for name, case in cases.items()
        ]
        return pytest.mark.parametrize("reducer", found)(test)

    return decorate
