"""The runtime: drives a vision transformer block by block and carries out what reducers decide."""

from reducers.runtime.driver import ReducedViT, reduce_tokens
from reducers.runtime.shared import Shared

__all__ = ["ReducedViT", "Shared", "reduce_tokens"]
