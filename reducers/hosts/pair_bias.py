"""Relative positions as a bias for each pair of places, gathered for the tokens that are left. Knows no library.

Rows and columns of the bias go by place: prefix tokens first, then the patches of the whole grid. A pair one of whose
tokens has no place (EViT's fused one) has none. It costs no multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from reducers.tokens import TokenBatch


@dataclass(frozen=True, eq=False)
class Places:
    """What biases need beside a batch, in one pass."""

    untouched: Tensor  # (T,) the places as they were when the pass began
    prefix: int  # prefix tokens of the bias, at most the class token
    shared: Tensor | None = None  # (1, H, P + N0, P + N0) a bias that all blocks add


def by_place(bias: Tensor, batch: TokenBatch, places: Places) -> Tensor:
    """From a bias (1, H, P + N0, P + N0) by place to that of each image's tokens, (B or 1, H, L, L) padded."""
    assert batch.pos is not None
    if batch.pos is places.untouched:
        return bias
    layout, nowhere = batch.layout, bias.shape[-1]
    index = (batch.pos + places.prefix).masked_fill(batch.pos < 0, nowhere)
    if places.prefix:
        index = index.masked_fill(layout.is_prefix, 0)
    padded = layout.pad(index, fill=nowhere)  # (B, L)
    whole = F.pad(bias[0], (0, 1, 0, 1))  # (H, P + N0 + 1, P + N0 + 1): nothing is added nowhere
    return whole[:, padded[:, :, None], padded[:, None, :]].transpose(0, 1)
