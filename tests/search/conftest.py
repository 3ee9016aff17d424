"""What tests of the search share: a paired test and a chooser of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ablations.records.paired import mcnemar


def paired(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact test of right and wrong answers, two-sided."""
    return mcnemar(int((first > second).sum()), int((second > first).sum()))[0]


class Scripted:
    """A chooser that takes what a script says, and else the first option."""

    def __init__(self, **script: Any) -> None:
        self._script = {name.replace("_", " "): value for name, value in script.items()}
        self.asked: dict[str, Any] = {}

    def one_of(self, name: str, options: Sequence[Any]) -> Any:
        chosen = self._script.get(name, options[0])
        assert chosen in options, f"{name}: {chosen!r} is none of {options!r}"
        self.asked[name] = chosen
        return chosen

    def whole(self, name: str, low: int, high: int) -> int:
        chosen = self._script.get(name, low)
        assert low <= chosen <= high
        self.asked[name] = chosen
        return int(chosen)
