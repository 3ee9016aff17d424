"""Signals: what a reducer may look at, computed when asked for and not before.

All are packed by token (T, ...). ``class_attention`` costs one query row an image, ``keys`` and ``values`` one
projection; only
``attention`` and ``output`` need the whole of the block's attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from reducers.decision import Decision, class_rows_after
from reducers.errors import ReducerError
from reducers.tokens import Layout, TokenBatch

Spend = Callable[[Tensor], None]

_INPUT_ONLY = "at the input site a reducer has the features alone; what attention computes is at site = 'attention'"
NO_PREVIOUS = (
    "previous_attention() needs a plain block before this one: place the reducer at block 1 or later, not next to a "
    "method that replaces the block's attention (stvit), and let it say uses_previous_attention"
)


def known_positions(batch: TokenBatch) -> Tensor:
    """The positions a batch carries."""
    if batch.pos is None:
        raise ReducerError("positions() are tracked for reducers that say uses_positions")
    return batch.pos


class Signals(ABC):
    """What a reducer at the attention site can ask for."""

    def __init__(self, layout: Layout, size: Tensor, cls: Tensor, spend: Spend | None) -> None:
        self.layout = layout
        self.size = size  # (T,) float32
        self.cls = cls  # (B,) packed row of the class token, -1 where there is none
        self._spend = spend

    @property
    def is_class_token(self) -> Tensor:
        """(T,) bool."""
        rows = torch.arange(self.layout.rows, device=self.cls.device)
        return rows == self.cls[self.layout.row_image]

    def spend(self, macs: Tensor | float) -> None:
        """Book multiply-adds of the reducer's own, (B,) or one number for each image; free when nobody counts."""
        if self._spend is not None:
            zeros = torch.zeros(self.layout.images, dtype=torch.float64, device=self.layout.lengths.device)
            self._spend(zeros + macs)

    @property
    def counting(self) -> bool:
        """Whether costs are being counted; methods skip the arithmetic of ``spend`` otherwise."""
        return self._spend is not None

    @abstractmethod
    def class_attention(self) -> Tensor:
        """(T, H) attention each token receives from its image's class token, after the softmax."""

    @abstractmethod
    def keys(self) -> Tensor:
        """(T, H, d), after k_norm where the model has one. Not turned by places where the model has rope: tokens that
        are alike stay so wherever they lie, and all similarities are taken of these.
        """

    @abstractmethod
    def values(self) -> Tensor:
        """(T, H, d)."""

    @abstractmethod
    def attention(self) -> Tensor:
        """(B, H, L, L) after the softmax, padded with zeros: rows are queries."""

    def attend_with(self, attention: Tensor) -> None:
        """Let the block attend with this map (B, H, L, L) instead of its own; later signals follow from it (GTP)."""
        raise ReducerError(
            "the map that a block attends with can be replaced before anything has been decided in it, at "
            "site = 'attention': put this reducer first in the stack"
        )

    @abstractmethod
    def output(self) -> Tensor:
        """(T, D) features after the attention residual, before the MLP; at the input site, those entering the block."""

    @abstractmethod
    def previous_attention(self) -> Tensor:
        """(T,) attention each token received in the block before, over its heads and queries (mean)."""

    @abstractmethod
    def positions(self) -> Tensor:
        """(T,) the original patch (rows of ``State.grid`` one after another) a token still is, -1 for prefix tokens and
        those that are no one patch's continuation; needs ``uses_positions``.
        """

    def attention_received(self) -> Tensor:
        """(T,) attention each token receives, mean over heads and queries."""
        received = self.attention().sum(dim=(1, 2)) / self.attention().shape[1]  # (B, L)
        return self.layout.unpad(received / self.layout.lengths.clamp(min=1)[:, None])

    def through(self, decision: Decision) -> Signals:
        """The signals as the next reducer of a stack sees them: transported through what was decided so far."""
        return Transported(self, decision)


class InputSignals(Signals):
    """What a reducer at the input site can ask for: the features entering the block, and what the block before saw."""

    def __init__(self, batch: TokenBatch, spend: Spend | None) -> None:
        super().__init__(batch.layout, batch.size, batch.cls, spend)
        self._batch = batch

    def output(self) -> Tensor:
        return self._batch.x

    def positions(self) -> Tensor:
        return known_positions(self._batch)

    def previous_attention(self) -> Tensor:
        if self._batch.received is None:
            raise ReducerError(NO_PREVIOUS)
        return self._batch.received

    def class_attention(self) -> Tensor:
        raise ReducerError(_INPUT_ONLY)

    def keys(self) -> Tensor:
        raise ReducerError(_INPUT_ONLY)

    def values(self) -> Tensor:
        raise ReducerError(_INPUT_ONLY)

    def attention(self) -> Tensor:
        raise ReducerError(_INPUT_ONLY)


class Transported(Signals):
    """Signals carried through a decision at the same block.

    Attention columns add up over a group, keys and values average by map weight, and norms are taken afresh. After
    a merge this approximates what the merged tokens would have signalled; after a selection it is exact.
    """

    def __init__(self, before: Signals, decision: Decision) -> None:
        class_rows = class_rows_after(before.cls, decision.map)
        super().__init__(decision.map.new, decision.map.total(before.size), class_rows, before._spend)
        self._before = before
        self._decision = decision

    def _average(self, values: Tensor) -> Tensor:
        summed = self._decision.map.apply(values)
        ones = torch.ones(values.shape[0], 1, dtype=values.dtype, device=values.device)
        weight = self._decision.map.apply(ones).reshape(-1, *[1] * (values.dim() - 1))
        return summed / torch.where(weight.abs() > 0, weight, torch.ones_like(weight))

    def class_attention(self) -> Tensor:
        return self._decision.map.total(self._before.class_attention())

    def keys(self) -> Tensor:
        return self._average(self._before.keys())

    def values(self) -> Tensor:
        return self._average(self._before.values())

    def attention_received(self) -> Tensor:
        return self._decision.map.total(self._before.attention_received())

    def previous_attention(self) -> Tensor:
        return self._decision.map.total(self._before.previous_attention())

    def positions(self) -> Tensor:
        source = self._decision.map.source
        return self._before.positions()[source.clamp(min=0)].masked_fill(source < 0, -1)

    def attention(self) -> Tensor:
        token_map = self._decision.map
        columns = token_map.total(token_map.old.unpad(self._before.attention().permute(0, 3, 1, 2)))  # (M, H, L)
        rows = self._average(token_map.old.unpad(token_map.new.pad(columns).permute(0, 3, 2, 1)))  # (M, H, M)
        return token_map.new.pad(rows).transpose(1, 2)

    def output(self) -> Tensor:
        if self._decision.features is not None:
            return self._decision.features
        return self._decision.map.apply(self._before.output())
