"""What a reducer decides, and how everything that travels with the tokens is carried through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from reducers.errors import ReducerError
from reducers.maps import Keep, Mask, TokenMap
from reducers.tokens import Carry, TokenBatch


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


def advance(batch: TokenBatch, decision: Decision, x: Tensor | None = None, *, together: bool = False) -> TokenBatch:
    """Carry everything that travels with the tokens through a decision; ``x`` (M, D) are features already reduced.
    ``together``: it is one on all units of a sample, though others may be on each.
    """
    token_map = decision.map
    if x is None:
        x = decision.features if decision.features is not None else token_map.apply(batch.x)
    carried: dict[str, Any] = {
        name: carry(token_map, value, batch) for name, carry in _CARRIED if (value := getattr(batch, name)) is not None
    }
    if isinstance(token_map, Mask) and batch.alive is None:
        carried["alive"] = token_map.weight
    if decision.proportional:
        wide = torch.promote_types(x.dtype, torch.float32)
        by_size = carried["size"].to(wide).log()
        bias, biased = _weighed_by_size(token_map, by_size, carried.get("key_bias"), batch, together)
        return replace(batch, x=x, layout=token_map.new, **{**carried, "key_bias": bias, "biased": biased})
    return replace(batch, x=x, layout=token_map.new, **carried)


def _weighed_by_size(
    token_map: TokenMap, by_size: Tensor, bias: Tensor | None, batch: TokenBatch, together: bool
) -> tuple[Tensor, Tensor | None]:
    """From here on, attention to a token is weighted by its size, in the images of which something was merged."""
    new, units, biased = token_map.new, batch.units, batch.biased
    if new.uniform is not None:
        return by_size, None
    changed = new.lengths < token_map.old.lengths  # images of which nothing was merged keep the attention they had
    if units is not None and (
        together or units.decided == "together"
    ):  # one frame's tokens may have gone into another's
        changed = (units.sum(changed.long()) > 0)[units.sample]
    by_size = torch.where(changed[new.row_image], by_size, torch.zeros_like(by_size) if bias is None else bias)
    return by_size, changed if bias is None else None if biased is None else biased | changed


# --- how maps carry what travels with the tokens ----------------------------------------------------------------------


def _summed(token_map: TokenMap, values: Tensor, batch: TokenBatch) -> Tensor:
    return token_map.total(values)


def _log_of_the_sum(token_map: TokenMap, values: Tensor, batch: TokenBatch) -> Tensor:
    """exp(bias) is a number of tokens, so members add up; but an image that has none gets none,
    whatever the others of its batch have.
    """
    bias = token_map.total(values.exp()).log()
    return bias if batch.biased is None else bias.masked_fill(~batch.biased[token_map.new.row_image], 0)


def _of_the_heaviest(token_map: TokenMap, values: Tensor, batch: TokenBatch) -> Tensor:
    source = token_map.source
    return values[source.clamp(min=0)].masked_fill(source < 0, -1)


def _destinations(token_map: TokenMap, rows: Tensor, batch: TokenBatch) -> Tensor:
    """Rows of tokens, of any shape; -1 stays, and is what becomes of those dropped."""
    if not token_map.old.rows:
        return rows
    return token_map.destination[rows.clamp(min=0)].masked_fill(rows < 0, -1)


def _class_rows(token_map: TokenMap, rows: Tensor, batch: TokenBatch) -> Tensor:
    return class_rows_after(rows, token_map)


def _what_lives(token_map: TokenMap, alive: Tensor, batch: TokenBatch) -> Tensor:
    """What is left of the tokens that a mask let live."""
    if isinstance(token_map, Mask):
        return alive * token_map.weight
    if isinstance(token_map, Keep):
        return token_map.apply(alive)
    raise ReducerError("tokens under a training mask can be masked again or gathered, not merged; train them apart")


_RULES: dict[Carry, Callable[[TokenMap, Tensor, TokenBatch], Tensor]] = {
    "sum": _summed,
    "log of the sum": _log_of_the_sum,
    "heaviest": _of_the_heaviest,
    "destination": _destinations,
    "class row": _class_rows,
    "what lives": _what_lives,
}
_CARRIED = tuple(
    (each.name, _RULES[each.metadata["carried"]]) for each in fields(TokenBatch) if "carried" in each.metadata
)


def class_rows_after(rows: Tensor, token_map: TokenMap) -> Tensor:
    """Where the class tokens (B,) went; -1 where there is none or it was dropped."""
    if token_map.old.lead is not None and token_map.old.lead == token_map.new.lead:
        # nobody lost a prefix token, and the class token comes first
        if token_map.new.images == 1:  # which is row 0 then, before and after
            return rows
        return token_map.new.starts.where(rows >= 0, rows)
    return token_map.destination[rows.clamp(min=0)].masked_fill(rows < 0, -1)
