"""Arms as plain data: the defaults of ``base`` filled in, and the values that an arm spans.

The one reading of both: of ``model``, which validates every key, and of ``written``, where there is no pydantic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SPECS = Path(__file__).parents[1] / "specs"
LISTS = ("target", "batch", "restore")  # keys of an arm that vary like those of `vary`


def merged(base: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    """What an arm says over what ``base`` says; ``set`` is joined by name, the rest is replaced."""
    return {**base, **arm, "set": {**base.get("set", {}), **arm.get("set", {})}}


def lists_of(arm: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Everything that varies by itself, with its values."""
    return {**arm.get("vary", {}), **{name: given for name in LISTS if (given := arm.get(name))}}


def combinations(arm: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The values of each trial of a merged arm: all of its cases, values and seeds with one another, in its order."""
    lists = lists_of(arm)
    for case in arm.get("cases") or [{}]:
        for chosen in itertools.product(*lists.values()):
            for seed in arm.get("seeds", [0]):
                yield {**arm.get("set", {}), **case, **dict(zip(lists, chosen, strict=True)), "seed": seed}
