"""Top-K: keep the highest-scoring patch tokens (the ATS paper's comparison, Haurum et al.'s baseline)."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor

from reducers.budget import Budget, Rounding
from reducers.decision import Decision
from reducers.kit import selection
from reducers.maps import Keep
from reducers.reducer import Searchable, State
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Counts, Layout


@register("topk")
class TopK(selection.Ranked):
    """Keep the patch tokens of highest score; the rest are dropped.

    The dropped tokens still serve as keys and values in the block that drops them.

    Args:
        budget: patches kept; ``Ratio`` rounds down (K_n = floor(rho x tokens entering the stage)) and counts patch
            tokens; with ``count_prefix=True`` it counts all.
        score: by which patches are ranked.
        seed: of ``score="random"``.
    """

    summary = "keep the K patch tokens of highest score"
    source = "Fayyaz et al., ECCV 2022 (comparison); Haurum et al., ICCVW 2023"
    searchable: ClassVar[Searchable] = {
        "score": ("class_attention", "class_attention_value_norm", "attention_received", "value_norm"),
    }

    def decide(self, signals: Signals, state: State) -> Decision | None:
        kept = self.highest(signals, state, "floor")
        return None if kept is None else Decision(kept)


def _keep_count(layout: Layout, budget: Budget, state: State, rounding: Rounding) -> Tensor | int:
    """As it was: one number where all images are alike, else (B,)."""
    counts = selection.keep_count(layout, budget, state, rounding)
    return counts.each if counts.alike is None else counts.alike


def _keep_highest(layout: Layout, scores: Tensor, count: Counts | Tensor | int) -> Keep | None:
    return selection.keep_highest(layout, scores, Counts.of(layout, count))


def __getattr__(name: str) -> Any:
    """What stood here before ``reducers.kit`` was there; counts were tensors or numbers then."""
    old: dict[str, Any] = {"keep_count": _keep_count, "keep_highest": _keep_highest}
    if name not in ("first_of", "rank_patches", *old):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} of the top-K's file is now in reducers.kit.selection", DeprecationWarning, stacklevel=2)
    return old[name] if name in old else getattr(selection, name)
