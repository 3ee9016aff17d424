"""Top-K: keep the highest-scoring patch tokens (methods 5; the ATS paper's comparison, Haurum et al.'s baseline)."""

from __future__ import annotations

import warnings
from typing import Any

from reducers.decision import Decision
from reducers.kit import selection
from reducers.reducer import State
from reducers.registry import register
from reducers.signals import Signals


@register("topk")
class TopK(selection.Ranked):
    """Keep the ``budget`` patch tokens of highest score; the rest are dropped.

    The dropped tokens still serve as keys and values in the block that drops them. ``Ratio`` rounds down (K_n =
    floor(rho x tokens entering the stage)) and counts patch tokens; with ``count_prefix=True`` it counts all.
    ``seed`` matters to ``score="random"`` only.
    """

    summary = "keep the K patch tokens of highest score"
    source = "Fayyaz et al., ECCV 2022 (comparison); Haurum et al., ICCVW 2023"

    def decide(self, signals: Signals, state: State) -> Decision | None:
        kept = self.highest(signals, state, "floor")
        return None if kept is None else Decision(kept)


def __getattr__(name: str) -> Any:
    """What stood here before ``reducers.kit`` was there."""
    if name not in ("first_of", "keep_count", "keep_highest", "rank_patches"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} of the top-K's file is now in reducers.kit.selection", DeprecationWarning, stacklevel=2)
    return getattr(selection, name)
