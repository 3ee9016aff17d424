"""What a reducer decides, and how everything that travels with the tokens is carried through it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reducers.errors import ReducerError
from reducers.maps import Keep, Mask, TokenMap
from reducers.tokens import TokenBatch


@dataclass(frozen=True)
class Decision:
    """What becomes of the tokens at one block.

    ``features`` (M, D) replaces W x where a method is not linear (max pooling, norm-preserving merges); the map
    still carries sizes and provenance. ``proportional``: from here on, attention to a token is weighted by its
    size (ToMe).
    """

    map: TokenMap
    features: Tensor | None = None
    proportional: bool = False


def advance(batch: TokenBatch, decision: Decision, x: Tensor | None = None) -> TokenBatch:
    """Carry everything that travels with the tokens through a decision; ``x`` (M, D) are features already reduced."""
    token_map = decision.map
    if x is None:
        x = decision.features if decision.features is not None else token_map.apply(batch.x)
    size = token_map.total(batch.size)
    bias, biased = _bias_after(batch, decision, size, x.dtype)
    pos = batch.pos
    if pos is not None:
        source = token_map.source
        pos = pos[source.clamp(min=0)].masked_fill(source < 0, -1)
    received = None if batch.received is None else token_map.total(batch.received)
    class_rows = class_rows_after(batch.cls, token_map)
    return replace(
        batch, x=x, layout=token_map.new, size=size, cls=class_rows, pos=pos, key_bias=bias, biased=biased,
        received=received, alive=_alive_after(batch.alive, token_map),
    )  # fmt: skip


def _bias_after(
    batch: TokenBatch, decision: Decision, size: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the logits of the tokens that are left, and in which images (``TokenBatch.biased``)."""
    token_map, bias, biased = decision.map, batch.key_bias, batch.biased
    new = token_map.new
    if bias is not None:  # exp(bias) is a number of tokens, so members add up
        bias = token_map.total(bias.exp()).log()
        if biased is not None:  # but an image that has none gets none, whatever the others of its batch have
            bias = bias.masked_fill(~biased[new.row_image], 0)
    if not decision.proportional:
        return bias, biased
    by_size = size.to(torch.promote_types(dtype, torch.float32)).log()
    if new.uniform is not None:
        return by_size, None
    changed = new.lengths < token_map.old.lengths  # images of which nothing was merged keep the attention they had
    by_size = torch.where(changed[new.row_image], by_size, torch.zeros_like(by_size) if bias is None else bias)
    return by_size, changed if bias is None else None if biased is None else biased | changed


def _alive_after(alive: Tensor | None, token_map: TokenMap) -> Tensor | None:
    """What is left of the tokens that a mask let live."""
    if isinstance(token_map, Mask):
        return token_map.weight if alive is None else alive * token_map.weight
    if alive is None or isinstance(token_map, Keep):
        return None if alive is None else token_map.apply(alive)
    raise ReducerError("tokens under a training mask can be masked again or gathered, not merged; train them apart")


def class_rows_after(rows: Tensor, token_map: TokenMap) -> Tensor:
    """Where the class tokens (B,) went; -1 where there is none or it was dropped."""
    if token_map.old.lead is not None and token_map.old.lead == token_map.new.lead:
        # nobody lost a prefix token, and the class token comes first
        if token_map.new.images == 1:  # which is row 0 then, before and after
            return rows
        return token_map.new.starts.where(rows >= 0, rows)
    return token_map.destination[rows.clamp(min=0)].masked_fill(rows < 0, -1)
