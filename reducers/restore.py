"""From the tokens that are left to a dense map: every original patch in its place again.

A patch that is carried, by a row of its own or by the row it was merged into, shows the features of that row. The rules
differ in what they say of patches that were dropped:

=====  ===========================================================================================================
owner  nothing: where a method drops, the map is refused, for there is nothing to copy
zero   zeros: the control
last   the features with which its row entered the block that dropped it, through the model's final norm
=====  ===========================================================================================================

Without reduction every rule is the identity. All rules copy rows, so they commute with what acts on tokens one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from reducers.checks import checked_choice
from reducers.errors import ReducerError
from reducers.tokens import TokenBatch

Rule = Literal["owner", "zero", "last"]


class Restorer:
    """Follows the patches through one forward pass and puts them back in their places after it.

    Raises:
        ReducerError: there is no such rule.
    """

    def __init__(self, rule: str) -> None:
        self.rule = cast(Rule, checked_choice(rule, Rule, "restore=…"))
        self._gone: list[tuple[int, Tensor]] = []  # block, (B, N0) bool: patches that it dropped
        self._left: Tensor | None = None  # (B, N0, D) of those the features they had

    def after_block(self, block: int, entering: TokenBatch, leaving: TokenBatch) -> None:
        """A block in which a reducer acted is done."""
        assert entering.origin is not None and leaving.origin is not None
        gone = (entering.origin >= 0) & (leaving.origin < 0)
        self._gone.append((block, gone))
        if self.rule == "last" and entering.layout.rows:
            rows = entering.x[entering.origin.clamp(min=0)]
            self._left = torch.where(
                gone[..., None], rows, torch.zeros_like(rows) if self._left is None else self._left
            )

    def forget(self) -> None:
        """A later stage has begun: all of its patches are there."""
        self._gone, self._left = [], None

    def restore(self, batch: TokenBatch, features: Callable[[Tensor], Tensor], names: Callable[[int], str]) -> Tensor:
        """The dense map (B, N0, D).

        ``features`` takes tokens (..., D) from the last block to what the library hands out; ``names`` tells what acts
        at a block, for messages.

        Raises:
            ReducerError: the rule cannot say what stands in the place of a patch that was dropped.
        """
        assert batch.origin is not None
        x = features(batch.x)
        dropped = batch.origin < 0
        if self.rule == "owner":
            self._refuse(names)
        if not batch.layout.rows:  # no image has a token left
            found = x.new_zeros(*batch.origin.shape, x.shape[1])
        else:
            found = x[batch.origin.clamp(min=0)].masked_fill(dropped[..., None], 0)
        if self.rule == "last" and self._left is not None:
            found = torch.where(dropped[..., None], features(self._left), found)
        return found

    def _refuse(self, names: Callable[[int], str]) -> None:
        for block, gone in self._gone:
            if bool(gone.any()):
                raise ReducerError(
                    f"{names(block)} at block {block} drops patches, so restore='owner' has nothing to put in their "
                    'places; use restore="zero" (zeros there) or restore="last" (the features they had when they were '
                    "dropped), or a method that merges"
                )


def with_prefix(batch: TokenBatch, features: Callable[[Tensor], Tensor], dense: Tensor, prefix: int) -> Tensor:
    """The model's prefix tokens before the map: (B, P + N0, D), as libraries hand out their tokens; of a clip, those of
    all its frames, or where these share them, the one set.

    Raises:
        ReducerError: an image has lost a prefix token.
    """
    layout = batch.layout
    lead = layout.lead if layout.images else prefix
    if lead != prefix:
        raise ReducerError(
            "an image has lost its class token, which these features begin with; keep it (keep_class_token=True), or "
            "ask features(images, restore=…) for the patches alone"
        )
    starts = batch.starts if batch.units is not None and batch.units.shared else layout.starts
    rows = starts[:, None] + torch.arange(prefix, device=dense.device)
    return torch.cat([features(batch.x[rows]).reshape(batch.samples, -1, dense.shape[-1]), dense], dim=1)
