"""What models answer: timm's give logits, those of transformers an object that holds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(answer: Any) -> Tensor:
    """The logits (B, classes) in what a model returned."""
    logits: Tensor = answer if isinstance(answer, Tensor) else answer.logits
    return logits
