"""Stochastic depth of a model that is trained."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates

from ablations.models.weight_files import ModelError


def set_drop_path(model: Any, rate: float) -> None:
    """timm's stochastic depth, growing linearly over the blocks; it has no weights, so the state stays the model's."""
    if rate == 0:
        return
    if not hasattr(model, "blocks"):
        raise ModelError(
            f"stochastic depth of a {type(model).__name__} is not set from outside; leave drop_path out of the training"
        )
    rates: list[Any] = calculate_drop_path_rates(rate, len(model.blocks))
    for block, share in zip(model.blocks, rates, strict=True):
        block.drop_path1, block.drop_path2 = DropPath(float(share)), DropPath(float(share))
