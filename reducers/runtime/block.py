"""One transformer block on packed tokens, with a reducer in it or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from reducers.cost import BlockCost
from reducers.decision import Decision, advance
from reducers.errors import ReducerError
from reducers.hosts.protocol import Host, HostBlock
from reducers.lazy import cached_property
from reducers.maps import Keep
from reducers.recording import recording
from reducers.reducer import State, TokenReducer
from reducers.runtime.attention import PackedAttention
from reducers.runtime.over import over
from reducers.runtime.units import in_units, into_units, out_of_units
from reducers.signals import NO_PREVIOUS, InputSignals, Signals, known_positions
from reducers.stack import Stack
from reducers.tokens import Layout, TokenBatch
from reducers.trace import Tracer


class BlockSignals(Signals):
    """The signals of one block over one batch."""

    def __init__(self, block: HostBlock, batch: TokenBatch, tracer: Tracer | None, *, fold: bool = False) -> None:
        super().__init__(batch.layout, batch.size, batch.cls, None if tracer is None else tracer.cost.spend)
        self.block = block
        self.batch = batch
        self.attention_core = PackedAttention(block.core(batch), batch.key_bias, batch.alive, fold=fold)
        self._class_attention: Tensor | None = None
        self._attention: Tensor | None = None
        self._output: Tensor | None = None

    @cached_property
    def cost(self) -> BlockCost:
        return self.block.cost

    @property
    def key_counts(self) -> Tensor:
        """(B,) keys of each image."""
        return self.block.key_counts(self.batch)

    @property
    def computed_output(self) -> bool:
        return self._output is not None

    def class_attention(self) -> Tensor:
        if self._class_attention is None:
            if any(lead == 0 for _, lead in self.layout.kinds):
                raise ReducerError(
                    "class_attention() asks the class token, and an image has none left here: a method that finishes "
                    "images early (avit) acts before; place this one before it, or use a score without a class token"
                )
            self._class_attention = self.attention_core.row(self.batch.cls)
            if self.counting:
                self.spend(self.cost.query_row + self.key_counts * self.cost.pair)
        return self._class_attention

    def keys(self) -> Tensor:
        return self.attention_core.core.to_tokens(self.attention_core.keys, "mean")

    def values(self) -> Tensor:
        return self.attention_core.core.to_tokens(self.attention_core.values, "mean")

    def attention(self) -> Tensor:
        if self._attention is None:
            self.attention_core.use_all_queries()
            self._attention = self.attention_core.token_map()
            if self.counting:  # the fused kernel computes these products once more
                self.spend(self._pairs())
        return self._attention

    def attend_with(self, attention: Tensor) -> None:
        if self.counting and self._attention is not None:  # the kernel does not compute the map's products again
            self.spend(-self._pairs())
        self.attention_core.attend_with(attention)
        self._attention, self._class_attention, self._output = attention, None, None

    def _pairs(self) -> Tensor:
        """Multiply-adds of all logits, (B,) float64."""
        return self.layout.lengths.double() * self.key_counts.double() * self.cost.pair

    def output(self) -> Tensor:
        if self._output is None:
            self.attention_core.use_all_queries()
            self._output = self.rows(None, self.layout)
        return self._output

    def positions(self) -> Tensor:
        return known_positions(self.batch)

    def previous_attention(self) -> Tensor:
        if self.batch.received is None:
            raise ReducerError(NO_PREVIOUS)
        return self.batch.received

    def rows(self, rows: Tensor | None, layout: Layout) -> Tensor:
        """Features after the attention residual, for the given packed rows alone."""
        added = self.attention_core.rows_out(rows, layout)
        x = self.batch.x if rows is None else self.batch.x.index_select(0, rows)
        return self.block.after_attention(x, added, layout)


def members_of(reducer: TokenReducer | None) -> list[TokenReducer]:
    """The reducers that act at a block, first to last."""
    if reducer is None:
        return []
    return reducer.members if isinstance(reducer, Stack) else [reducer]


def decisions_of(
    members: Sequence[TokenReducer],
    signals: Signals,
    state: State,
    block: HostBlock | None = None,
    names: list[str] | None = None,
) -> list[Decision]:
    """What each reducer decides, on what those before it leave; ``block`` may refuse it. ``names``: is told whose they
    are.
    """
    decisions: list[Decision] = []
    carried: Decision | None = None  # the latest that the signals have been taken through
    for member in members:
        if decisions and decisions[-1] is not carried:
            carried = decisions[-1]
            signals = signals.through(carried)
        decision = member.decide(signals, state)
        if member.traits.uses_random:
            state = replace(state, draw=state.draw + 1)
        if decision is not None:
            if block is not None:
                block.allow(member.name, decision.map)
            decisions.append(decision)
            if names is not None:
                names.append(member.name)
    return decisions


def _decide(
    members: Sequence[TokenReducer],
    signals: Signals,
    state: State,
    block: HostBlock,
    batch: TokenBatch,
    *,
    whole: bool = False,
) -> list[Decision]:
    """What reducers decide of the tokens of a batch, whatever they count over; ``whole``: over whole clips."""
    shown = over(signals, batch, whole=whole)
    if shown is None:
        return decisions_of(members, signals, state, block)
    if whole:
        state = _of_clips(state, batch)
    names: list[str] = []
    return shown.back(decisions_of(members, shown, state, block, names), names)


def _of_clips(state: State, batch: TokenBatch) -> State:
    """What reducers that decide on whole clips may know, where all else is told of frames."""
    units = batch.units
    assert units is not None
    if units.decided != "each":
        return state
    rows, columns = state.grid
    return replace(
        state, initial=state.initial * units.each, grid=(rows * state.steps, columns), image_keys=None
    )  # numbers are drawn for frames here


def _carry_out(decisions: list[Decision], batch: TokenBatch, *, together: bool = False) -> TokenBatch:
    for decision in decisions:
        batch = advance(batch, decision, together=True) if together else advance(batch, decision)
    return batch


def _reduce_input(
    block: HostBlock, members: list[TokenReducer], batch: TokenBatch, state: State, tracer: Tracer | None
) -> TokenBatch:
    """Reducers at the input site: they see the features that enter the block, and the block sees what they leave."""
    for whole, some in groupby(members, key=lambda member: member.traits.whole_clip):
        acting = list(some)
        signals = InputSignals(batch, None if tracer is None else tracer.cost.spend)
        batch = _carry_out(_decide(acting, signals, state, block, batch, whole=whole), batch, together=whole)
        state = replace(state, draw=state.draw + sum(member.traits.uses_random for member in acting))
    return batch


def _pure_selection(decisions: list[Decision]) -> Keep | None:
    """The decisions as one gather, where that is all they are."""
    composed: Keep | None = None
    for decision in decisions:
        if not isinstance(decision.map, Keep) or decision.features is not None or decision.proportional:
            return None
        joined = decision.map if composed is None else composed.then(decision.map)
        assert isinstance(joined, Keep)
        composed = joined
    return composed


def run_block(
    block: HostBlock,
    batch: TokenBatch,
    reducer: TokenReducer | None,
    state: State,
    tracer: Tracer | None,
    *,
    record_attention: bool = False,
    decide_only: bool = False,
    fold: bool = False,
) -> TokenBatch:
    """Attention, reduction, MLP: the only place where token counts change.

    ``record_attention``: the next block's reducer asks for the attention that tokens received in this one.
    ``decide_only``: what the tokens become is not asked for, only how many stay and what it costs; the features of
    the batch returned mean nothing. ``fold``: see ``reducers.runtime.fold``.
    """
    entered, grouping = batch, block.grouping(batch)
    if grouping is not None:
        batch, state = into_units(batch, grouping), in_units(state, grouping)
    batch = block.arrive(batch)
    batch, rows = _attend(block, batch, members_of(reducer), state, tracer, record_attention, decide_only, fold)
    if not decide_only:
        batch = block.settle(batch)
        batch = replace(batch, x=block.after_mlp(batch.x, batch.layout))
    if tracer is not None:
        tracer.cost.block(
            block.cost, entering=rows.entering, keys=rows.keys, queries=rows.queries, leaving=batch.layout.lengths,
            published_keys=rows.published, beside=rows.beside,
            cut_before_values=reducer is not None and reducer.traits.cuts_before_values,
            mlp=block.mlp_rows(batch),
        )  # fmt: skip
    if grouping is not None:
        batch = out_of_units(batch, entered, grouping)
    if tracer is not None:
        tracer.after_block(batch)
    return batch


FEW = 1024
"""Rows up to which a block without a reducer is left to its library: fewer steps, which a small batch waits for. Above,
adding residuals in place and freeing queries, keys and values early is worth more (measured: DeiT-Ti, two threads)."""


def runs_as_it_is(batch: TokenBatch) -> bool:
    """Whether the library's own blocks may compute the same: nothing but features and places travels."""
    uniform = batch.layout.uniform
    if uniform is None or any(part is not None for part in (batch.key_bias, batch.received, batch.alive)):
        return False
    return not recording() and (torch.compiler.is_compiling() or batch.layout.rows <= FEW)


class Rows(NamedTuple):
    """How many rows each part of a block's attention computed, (B,) each; of blocks with units of their own, (U,)."""

    entering: Tensor
    keys: Tensor
    queries: Tensor
    beside: Tensor | None = None
    published: Tensor | None = None  # keys in the published order of work, where those are others


def _attend(
    block: HostBlock,
    batch: TokenBatch,
    members: list[TokenReducer],
    state: State,
    tracer: Tracer | None,
    record_attention: bool,
    decide_only: bool,
    fold: bool,
) -> tuple[TokenBatch, Rows]:
    """Everything before the MLP.

    Queries, keys and values are free again when it returns: held through the MLP they would set the peak of memory.
    """
    first = [member for member in members if member.traits.site == "input"]
    if first:
        batch = _reduce_input(block, first, batch, state, tracer)
        state = replace(state, draw=sum(member.traits.uses_random for member in first))
    if tracer is not None and (fixed := block.fixed_macs(batch)) is not None:
        tracer.cost.both(fixed)
    batch = block.before(batch)
    entering = batch.layout.lengths
    signals = BlockSignals(block, batch, tracer, fold=fold)
    decisions = _decide(members[len(first) :], signals, state, block, batch)
    if record_attention or batch.received is not None:
        batch = replace(batch, received=signals.attention_received() if record_attention else None)
    selection = None if signals.computed_output else _pure_selection(decisions)
    queries = entering if selection is None else selection.new.lengths
    if selection is not None and signals.counting and signals.attention_core.computed_all_queries:
        # a signal needed the queries of the others too
        signals.spend((entering - queries) * signals.cost.query_row)
    rows = Rows(entering, signals.key_counts, queries, block.keys_beside(batch))
    if tracer is not None and not block.keys_are_tokens:
        rows = rows._replace(published=block.published_keys(batch))
    if decide_only:
        return _decided(decisions, batch, block.keys_are_tokens), rows
    if selection is None:
        return _carry_out(decisions, replace(batch, x=signals.output())), rows
    return advance(batch, Decision(selection), signals.rows(selection.rows, selection.new)), rows


def _decided(decisions: list[Decision], batch: TokenBatch, counts_alone: bool) -> TokenBatch:
    """How many tokens the decisions leave, and where that is not all that later costs depend on, which; no features."""
    if counts_alone:
        return replace(batch, layout=decisions[-1].map.new if decisions else batch.layout)
    for decision in decisions:
        batch = advance(batch, decision, batch.x.new_empty(decision.map.new.rows, batch.x.shape[1]))
    return batch


def account(host: Host, blocks: range, batch: TokenBatch, tracer: Tracer) -> None:
    """Book blocks that reduce nothing without running them: their tokens are known already, or nobody asks for them."""
    for index in blocks:
        block = host.block(index)
        grouping = block.grouping(batch)
        units = batch if grouping is None else into_units(batch, grouping)
        tokens = units.layout.lengths
        if (fixed := block.fixed_macs(units)) is not None:
            tracer.cost.both(fixed)
        keys = block.key_counts(units)
        published = None if block.keys_are_tokens else block.published_keys(units)
        tracer.cost.block(
            block.cost, entering=tokens, keys=keys, queries=tokens, leaving=tokens, published_keys=published,
            beside=block.keys_beside(units), mlp=block.mlp_rows(units),
        )  # fmt: skip
        tracer.after_block(batch)
