"""The runtime for timm's vision transformers: the only part of the science that imports timm."""

from reducers.vit.driver import ReducedViT, reduce_tokens
from reducers.vit.shared import Shared

__all__ = ["ReducedViT", "Shared", "reduce_tokens"]
