"""The runtime for timm's vision transformers: the only part of the science that imports timm."""

from reducers.vit.driver import ReducedViT, reduce_tokens

__all__ = ["ReducedViT", "reduce_tokens"]
