"""One transformer block on packed tokens, with a reducer in it or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from timm.layers import DropPath
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reducers.cost import BlockShape
from reducers.decision import Decision, advance
from reducers.errors import ReducerError
from reducers.lazy import cached_property
from reducers.maps import Keep
from reducers.reducer import State, TokenReducer
from reducers.signals import NO_PREVIOUS, InputSignals, Signals, known_positions
from reducers.stack import Stack
from reducers.tokens import Layout, TokenBatch
from reducers.trace import Tracer
from reducers.vit.attention import PackedAttention


class BlockSignals(Signals):
    """The signals of one timm block over one batch."""

    def __init__(self, block: Block, batch: TokenBatch, tracer: Tracer | None) -> None:
        super().__init__(batch.layout, batch.size, batch.cls, None if tracer is None else tracer.cost.spend)
        self.block = block
        self.batch = batch
        attn = block.attn
        assert isinstance(attn, Attention)  # check_model saw to it
        self.attention_core = PackedAttention(attn, block.norm1(batch.x), batch.layout, batch.key_bias, batch.alive)
        self._class_attention: Tensor | None = None
        self._attention: Tensor | None = None
        self._output: Tensor | None = None

    @cached_property
    def shape(self) -> BlockShape:
        return BlockShape.of(self.block)

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
                width = self.shape.attention_width
                self.spend(self.shape.width * width + self.layout.lengths * width)
        return self._class_attention

    def keys(self) -> Tensor:
        return self.attention_core.keys

    def values(self) -> Tensor:
        return self.attention_core.values

    def attention(self) -> Tensor:
        if self._attention is None:
            self.attention_core.use_all_queries()
            self._attention = self.attention_core.map()
            if self.counting:  # the fused kernel computes these products once more
                self.spend(self.layout.lengths.double() ** 2 * self.shape.attention_width)
        return self._attention

    def attend_with(self, attention: Tensor) -> None:
        if self.counting and self._attention is not None:  # the kernel does not compute the map's products again
            self.spend(-(self.layout.lengths.double() ** 2) * self.shape.attention_width)
        self.attention_core.attend_with(attention)
        self._attention, self._class_attention, self._output = attention, None, None

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
        block = self.block
        added = block.ls1(self.attention_core.rows_out(rows, layout))
        x = self.batch.x if rows is None else self.batch.x.index_select(0, rows)
        attn = self.attention_core.attn
        return _residual(x, drop_path(block.drop_path1, added, layout), attn.proj, attn.proj_drop, block.ls1)


def drop_path(module: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """timm's stochastic depth on packed tokens: a whole image's branch is dropped at once."""
    if not isinstance(module, DropPath) or not module.training or module.drop_prob == 0:
        return x
    keep = 1 - module.drop_prob
    images = torch.empty(layout.images, dtype=x.dtype, device=x.device).bernoulli_(keep)
    if keep > 0 and module.scale_by_keep:
        images = images / keep
    return x * images[layout.row_image, None]


def members_of(reducer: TokenReducer | None) -> list[TokenReducer]:
    """The reducers that act at a block, first to last."""
    if reducer is None:
        return []
    return reducer.members if isinstance(reducer, Stack) else [reducer]


def decisions_of(members: Sequence[TokenReducer], signals: Signals, state: State) -> list[Decision]:
    """What each reducer decides, on what those before it leave."""
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
            decisions.append(decision)
    return decisions


def _carry_out(decisions: list[Decision], batch: TokenBatch, tracer: Tracer | None) -> TokenBatch:
    for decision in decisions:
        batch = advance(batch, decision)
        if tracer is not None:
            tracer.moved(decision.map)
    return batch


def _reduce_input(members: list[TokenReducer], batch: TokenBatch, state: State, tracer: Tracer | None) -> TokenBatch:
    """Reducers at the input site: they see the features that enter the block, and the block sees what they leave."""
    signals = InputSignals(batch, None if tracer is None else tracer.cost.spend)
    return _carry_out(decisions_of(members, signals, state), batch, tracer)


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
    block: Block,
    batch: TokenBatch,
    reducer: TokenReducer | None,
    state: State,
    tracer: Tracer | None,
    *,
    record_attention: bool = False,
    decide_only: bool = False,
) -> TokenBatch:
    """Attention, reduction, MLP: the only place where token counts change.

    ``record_attention``: the next block's reducer asks for the attention that tokens received in this one.
    ``decide_only``: what the tokens become is not asked for, only how many stay and what it costs; the features of
    the batch returned mean nothing.
    """
    batch, entering, queries = _attend(block, batch, members_of(reducer), state, tracer, record_attention, decide_only)
    if not decide_only:
        added = block.ls2(block.mlp(block.norm2(batch.x)))
        added = drop_path(block.drop_path2, added, batch.layout)
        batch = replace(batch, x=_residual(batch.x, added, block.mlp, block.ls2))
    if tracer is not None:
        tracer.cost.block(
            BlockShape.of(block), entering=entering, queries=queries, leaving=batch.layout.lengths,
            cut_before_values=reducer is not None and reducer.traits.cuts_before_values,
        )  # fmt: skip
        tracer.after_block(batch)
    return batch


FEW = 1024
"""Rows up to which a block without a reducer is left to timm: fewer steps, which a small batch waits for. Above, adding
residuals in place and freeing queries, keys and values early is worth more (measured: DeiT-Ti, two threads)."""


def runs_as_it_is(batch: TokenBatch) -> bool:
    """Whether timm's own blocks compute the same: nothing but features travels with the tokens."""
    uniform = batch.layout.uniform
    if uniform is None or any(part is not None for part in (batch.key_bias, batch.received, batch.alive)):
        return False
    return not torch.is_grad_enabled() and (torch.compiler.is_compiling() or batch.layout.rows <= FEW)


def run_plain(blocks: nn.Sequential, batch: TokenBatch, tracer: Tracer | None) -> TokenBatch:
    """Blocks in which nobody acts, one after another, by timm itself; the batch ``runs_as_it_is``."""
    layout = batch.layout
    assert layout.uniform is not None
    x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
    for block in blocks:
        x = block(x)
    batch = replace(batch, x=x.flatten(0, 1))
    if tracer is not None:
        account(blocks, batch, tracer)
    return batch


def _attend(
    block: Block,
    batch: TokenBatch,
    members: list[TokenReducer],
    state: State,
    tracer: Tracer | None,
    record_attention: bool,
    decide_only: bool,
) -> tuple[TokenBatch, Tensor, Tensor]:
    """Everything before the MLP; also the tokens entering the attention and the query rows computed in it, (B,) each.

    Queries, keys and values are free again when it returns: held through the MLP they would set the peak of memory.
    """
    first = [member for member in members if member.traits.site == "input"]
    if first:
        batch = _reduce_input(first, batch, state, tracer)
        state = replace(state, draw=sum(member.traits.uses_random for member in first))
    entering = batch.layout.lengths
    signals = BlockSignals(block, batch, tracer)
    decisions = decisions_of(members[len(first) :], signals, state)
    if record_attention or batch.received is not None:
        batch = replace(batch, received=signals.attention_received() if record_attention else None)
    selection = None if signals.computed_output else _pure_selection(decisions)
    queries = entering if selection is None else selection.new.lengths
    if selection is not None and signals.counting and signals.attention_core.computed_all_queries:
        # a signal needed the queries of the others too
        signals.spend((entering - queries) * signals.shape.width * signals.shape.attention_width)
    if decide_only:
        return replace(batch, layout=decisions[-1].map.new if decisions else batch.layout), entering, queries
    if selection is None:
        return _carry_out(decisions, replace(batch, x=signals.output()), tracer), entering, queries
    batch = advance(batch, Decision(selection), signals.rows(selection.rows, selection.new))
    if tracer is not None:
        tracer.moved(selection)
    return batch, entering, queries


def _residual(x: Tensor, added: Tensor, *sources: nn.Module) -> Tensor:
    """x + added, in the memory of ``added`` where no one can ask for it again: no gradient, and none of ``sources``,
    whose output it is.
    """
    if torch.is_grad_enabled() or added.dtype != x.dtype:  # autocast: the sum keeps the wider type
        return x + added
    if torch.compiler.is_compiling() or any(_may_keep(source) for source in sources):
        return x + added
    return added.add_(x)


def _may_keep(module: nn.Module) -> bool:
    """Whether a hook on the module, or code of its user's own in it, may hold on to its output."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    known = type(module).__module__.startswith(("torch.nn.modules.", "timm.layers."))
    return not known or any(_may_keep(part) for part in module._modules.values() if part is not None)


def account(blocks: Iterable[nn.Module], batch: TokenBatch, tracer: Tracer) -> None:
    """Book blocks that reduce nothing without running them: their tokens are known already, or nobody asks for them."""
    tokens = batch.layout.lengths
    for block in blocks:
        shape = BlockShape.of(block)
        tracer.cost.block(shape, entering=tokens, queries=tokens, leaving=tokens, cut_before_values=False)
        tracer.after_block(batch)
