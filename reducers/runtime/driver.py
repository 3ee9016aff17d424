"""The loop over blocks: holds an untouched model and drives it, with reducers where they were placed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reducers.checks import checked_choice
from reducers.decision import advance
from reducers.errors import ReducerError, UnsupportedModel
from reducers.frames import spread_steps
from reducers.hosts import host_of
from reducers.hosts.protocol import Host, Places
from reducers.noise import image_keys, unit_keys
from reducers.placement import Placement
from reducers.reducer import (
    ByReducer,
    Finishes,
    Plans,
    PlansTraining,
    Prepares,
    RunsBlocks,
    Selects,
    State,
    TokenReducer,
)  # fmt: skip
from reducers.restore import Restorer, with_prefix
from reducers.runtime.block import account, run_block, runs_as_it_is
from reducers.runtime.fits import check_plan
from reducers.runtime.fold import Attention
from reducers.runtime.plain import PlainModel, carriers, over_time
from reducers.runtime.plan import Plan
from reducers.runtime.shared import Shared
from reducers.tokens import TokenBatch
from reducers.trace import Trace, Tracer


def reduce_tokens(
    model: nn.Module,
    placement: Placement,
    *,
    places: Places = "heaviest",
    host: Mapping[str, str] | None = None,
    attention: Attention = "mask",
) -> ReducedViT:
    """Drive a plain vision transformer with reducers in it.

    The model is neither copied nor changed: it stays usable, and every variant of it shares its weights. What is done
    to it afterwards counts at the next call: other weights, parts, modes or settings. There is one mode, the model's:
    ``eval()`` and ``train()`` of the model and of the reduced one are the same. ``set_grad_checkpointing`` of the model
    is honoured; see ``ReducedViT``.

    ``places``: where a token that stands for several lies, for models whose blocks ask for that (rope): at the place of
    the heaviest of them, or, with ``"mean"``, at the mean of their coordinates, by number of patches.

    ``host``: options that the model's own host knows, ``{"fill": "zero"}`` of a CvT; most know none (docs/models.md).

    ``attention``: how the sizes of merged tokens come into attention in half precision on a GPU: as a ``"mask"``, or
    with ``"fold"`` inside the products, which leaves flash attention usable and rounds sizes less (docs/speed.md). On a
    CPU and in float32 there is no difference; costs are told alike.

    Raises:
        UnsupportedModel: a model whose blocks this runtime does not restate exactly; also at a call, after a change.
        ReducerError: a block outside the network, a reducer that needs what the model lacks, mean places where they
            mean nothing, or an option that the model does not know.
    """
    return ReducedViT(model, placement, places=places, host=host, attention=attention)


class ReducedViT(nn.Module):
    """A vision transformer and where its tokens are reduced. ``forward`` gives logits;
    ``trace`` also what happened and what it cost.

    ``training`` is the base's own, and the reducers follow it at each call. With ``base.set_grad_checkpointing()``
    every block keeps only its input for the backward pass and runs again there, with the random numbers it had, but
    for blocks of reducers that do more than decide (``only_decides``). On a device whose kernels add up in any order,
    a block that runs again may decide near ties otherwise; under ``torch.compile`` the compiler decides what it keeps.
    """

    def __init__(
        self,
        base: nn.Module,
        placement: Placement,
        *,
        places: Places = "heaviest",
        host: Mapping[str, str] | None = None,
        attention: Attention = "mask",
    ) -> None:
        super().__init__()
        if isinstance(base, ReducedViT):
            raise UnsupportedModel(
                "the model is reduced already; join the placements: reduce_tokens(model.base, first | second)"
            )
        driven = host_of(base, places=places, options=host)
        if not driven.depth:
            raise UnsupportedModel(f"this {type(base).__name__} has no blocks left, and nothing in it to reduce")
        if not isinstance(placement, Placement):
            raise ReducerError(
                f"reduce_tokens needs a placement such as at([3, 6, 9], EViT(Ratio(0.7))); got {placement!r}"
            )
        if placement.is_scheduled and driven.regroups:
            raise ReducerError(
                "a schedule shares the tokens of an image out over blocks, and every block of this "
                f"{type(base).__name__} forms units of its own (windows); give each block its budget"
            )
        patches = driven.patches if placement.is_scheduled else None  # not every model has a size of its own
        placement = placement.resolve(driven.depth, driven.first_free, patches=patches)
        self.base: Any = base
        reducers = nn.ModuleDict({str(block): reducer for block, reducer in sorted(placement.blocks.items())})
        plan = Plan.of(reducers)
        check_plan(driven, plan)
        self.reducers = reducers
        self.reducers.train(base.training)
        self._host, self._plan = driven, plan  # of this base and these reducers; ask ``host`` and ``plan``
        self._embed_macs: dict[tuple[int, ...], int] = {}
        self.attention = attention

    @property
    def attention(self) -> Attention:
        """How sizes come into attention where that is a choice: see ``reduce_tokens``."""
        return "fold" if self._fold else "mask"

    @attention.setter
    def attention(self, attention: Attention) -> None:
        self._fold = checked_choice(attention, Attention, "attention=…") == "fold"

    @property
    def host(self) -> Host:
        """The base as the runtime drives it."""
        base = self.__dict__["_modules"]["base"]  # by attribute, an exporter may give a stand-in of another type
        if self._host.model is not base:  # a replica's, or put in its place
            self._host = host_of(base, places=self._host.places, options=self._host.chosen)
        return self._host

    @property
    def plan(self) -> Plan:
        """What the placement fixes, read off ``reducers``, which alone owns it: so copies use their own."""
        reducers: Any = self.__dict__["_modules"]["reducers"]
        if not self._plan.fits(reducers):
            self._plan = Plan.of(reducers)
        return self._plan

    @property
    def placement(self) -> Placement:
        """Where the reducers act, read off ``reducers``, which alone owns them: so copies use their own."""
        return Placement({int(block): reducer for block, reducer in self.reducers.items()})  # type: ignore[misc]

    @property
    def training(self) -> bool:
        """The base's mode; the base keeps the modes its user gave its parts."""
        base = self.__dict__.get("_modules", {}).get("base")
        return base is None or base.training

    @training.setter
    def training(self, mode: bool) -> None:
        base = self.__dict__.get("_modules", {}).get("base")  # none yet while the module is made
        if base is not None:
            base.training = mode

    def forward(self, images: Tensor | None = None, **named: Any) -> Any:
        """images (B, C, H, W) -> logits (B, classes), or what the model's own library returns.

        A model of Hugging Face's takes its library's words: ``fast(pixel_values=…)``, and beside them ``restore``, the
        rule by which ``last_hidden_state`` is put together where patches were dropped (``features``).
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # documented
            check_exportable(self)
        call = self.host.asked(images, named)
        restorer = None if call.restore is None else Restorer(call.restore)
        host, batch = self._through(call.images, None, restorer=restorer, resized=call.resized)
        tokens = None if restorer is None else partial(self._tokens, host, batch, restorer)
        return host.answer(batch, call, tokens)

    def features(self, images: Tensor, restore: str | None = None) -> Tensor:
        """The pooled embedding (B, D): what the model's head reads, before its classifier; or the dense map.

        ``restore`` gives the features of every original patch in its place, (B, N0, D), after the final norm, by a
        rule of ``reducers.restore``: ``"owner"`` (the row that carries the patch), ``"zero"``, ``"last"``.

        Raises:
            ReducerError: the rule does not say what stands in the place of a patch, or the method has an output of its
                own, without places.
        """
        if restore is None:
            host, batch = self._through(images, None)
            return host.pooled(batch)
        restorer = Restorer(restore)
        host, batch = self._through(images, None, restorer=restorer)
        return restorer.restore(batch, host.token_features, self._acting)

    def forward_features(self, images: Tensor, restore: str = "owner") -> Tensor:
        """As timm's: the prefix tokens, and behind them the dense map, (B, P + N0, D); raises as ``features`` does."""
        restorer = Restorer(restore)
        host, batch = self._through(images, None, restorer=restorer)
        return self._tokens(host, batch, restorer)

    def _tokens(self, host: Host, batch: TokenBatch, restorer: Restorer) -> Tensor:
        dense = restorer.restore(batch, host.token_features, self._acting)
        return with_prefix(batch, host.token_features, dense, host.stages[-1].prefix)

    def _acting(self, block: int) -> str:
        """What acts at a block, in words."""
        return " and ".join(member.name for at, member in self.plan.acts if at == block)

    def unchecked(self, images: Tensor) -> Tensor:
        """The logits of ``forward``, for a tracer that only wants to see the operations of these images."""
        logits: Tensor = self._run(images, None)
        return logits

    def trace(self, images: Tensor, shared: Shared | None = None, *, pooled: bool = False) -> tuple[Tensor, Trace]:
        """The logits (B, classes), or of a model without a head the pooled embedding, and a trace of every image's
        tokens and cost.

        ``shared``: what other placements on the same images have computed of the blocks before ``first_block``;
        ``pooled``: the embedding of ``features``, (B, D), in place of the logits. The cost is that of the whole model.
        """
        tracer = Tracer()
        host, batch = self._through(images, tracer, shared)
        answer = host.pooled(batch) if pooled else host.classify(batch)
        return answer, tracer.finish()

    def trace_features(
        self, images: Tensor, restore: str, shared: Shared | None = None
    ) -> tuple[Tensor, Tensor, Trace]:
        """In one pass: the dense map of ``features(images, restore)`` (B, N0, D), and logits and trace of ``trace``.

        Raises:
            ReducerError: as ``features`` does.
        """
        restorer, tracer = Restorer(restore), Tracer()
        host, batch = self._through(images, tracer, shared, restorer=restorer)
        dense = restorer.restore(batch, host.token_features, self._acting)
        return dense, host.classify(batch), tracer.finish()

    @torch.no_grad()
    def cost(self, images: Tensor, shared: Shared | None = None) -> Tensor:
        """``trace(images)[1].macs``, (B,) float64, without running what comes after the last reducer."""
        tracer = Tracer(detail=False)
        self._run(images, tracer, shared, cost_only=True)
        return tracer.cost.executed

    @property
    def first_block(self) -> int:
        """The first block that does not compute what the plain model computes there; the depth if there is none."""
        return self.plan.first(self.host.depth)

    def members(self) -> list[TokenReducer]:
        """Every reducer that acts, a stack's members one by one."""
        return list(self.plan.members)

    def _run(
        self, images: Tensor, tracer: Tracer | None, shared: Shared | None = None, *, cost_only: bool = False
    ) -> Any:
        host, batch = self._through(images, tracer, shared, cost_only=cost_only)
        return None if cost_only else host.classify(batch)

    def _through(
        self,
        images: Tensor,
        tracer: Tracer | None,
        shared: Shared | None = None,
        *,
        cost_only: bool = False,
        restorer: Restorer | None = None,
        resized: bool = False,
    ) -> tuple[Host, TokenBatch]:
        """The tokens that leave the last block. ``restorer``: follows every patch, and is asked afterwards;
        ``resized``: the images have another size than the model's, and positions are interpolated.
        """
        host, plan = self._check()
        members = self.members()
        if restorer is not None:
            own = sorted({member.name for member in members if member.steps.finishes})
            if own:
                raise ReducerError(
                    f"{', '.join(own)} ends with an output of its own, whose tokens have no places; ask for pooled "
                    "features (features(images)), or place another method"
                )
        if host.borders or any(member.steps.looks_first for member in members):
            shared = None  # its tokens tell one stage's costs; or they look at the images in their own way first
        filler = Restorer(host.fill) if host.borders and plan.at else None
        run = _Pass(host, plan, members, tracer, shared, restorer, resized, filler, self._fold)
        run, index, batch, state = self._begin(run, images)
        host, depth, end = run.host, run.host.depth, run.host.depth
        counts_tell = cost_only and not host.regroups and host.between_units is None
        if counts_tell:  # the last reducer only decides, and nothing runs after it
            end = max(plan.at, default=-1) + 1
        batch = self._blocks(run, range(index, end), batch, state, decide_last=counts_tell)
        if tracer is not None:
            account(host, range(max(index, end), depth), batch, tracer)
            tracer.cost.both(host.head_macs(batch.layout))
        if not cost_only:
            for member in members:
                if member.steps.finishes:
                    batch = cast(Finishes, member).finish(batch, replace(state, block=depth))
        return host, batch

    def _blocks(self, run: _Pass, blocks: range, batch: TokenBatch, state: State, *, decide_last: bool) -> TokenBatch:
        """Some blocks one after another; ``decide_last``: of the last one's reducer only the decision is asked for."""
        host, plan, index, end = run.host, run.plan, blocks.start, blocks.stop
        first = plan.first(host.depth)
        borders = [stage.first for stage in host.stages if stage.first > blocks.start]  # the first has been entered
        while index < end:
            if index in borders:
                batch = self._enter_stage(run, index, batch)
            if run.shared is not None and index == first:
                run.shared.put(index, batch)
            idle = plan.next(index, end)
            if borders:
                idle = min(idle, *(border for border in (*borders, end) if border > index))
            after = host.plain(index, idle, batch) if idle > index and runs_as_it_is(batch) else None
            if after is None:
                entering = batch
                batch = self._block(
                    run, batch, replace(state, block=index), decide_only=decide_last and index == end - 1
                )
                if index in plan.at:
                    for restorer in run.restorers:
                        restorer.after_block(index, entering, batch)
                index += 1
                continue
            batch = after
            if run.tracer is not None:
                account(host, range(index, idle), batch, run.tracer)
            index = idle
        return batch

    def _enter_stage(self, run: _Pass, index: int, batch: TokenBatch) -> TokenBatch:
        """What lies before the first block of a later stage, whose patches are all there whatever was dropped."""
        host, tracer = run.host, run.tracer
        if tracer is not None:
            tracer.cost.both(host.enter_macs(index, batch))
            tracer.enter(host.parents(index, batch))

        def whole() -> Tensor:
            assert run.filler is not None
            return run.filler.restore(batch, lambda x: x, self._acting)

        entered = host.enter(index, batch, whole)
        for restorer in run.restorers:
            restorer.forget()
        return entered if batch.origin is None else entered.with_origin()

    def _begin(self, run: _Pass, images: Tensor) -> tuple[_Pass, int, TokenBatch, State]:
        """All that comes before the blocks: what the pass goes by now, the first block to run, the tokens that enter
        it, what reducers may know.
        """
        host, members, shared = run.host, run.members, run.shared
        if shared is not None:
            shared.claim(self.base, images)
        keys = None
        if any(member.traits.uses_random for member in members):
            keys = image_keys(images) if shared is None else shared.image_keys(images)
        plain, grid, given = PlainModel(host), host.grid_of(images), host.lattice_of(images)
        asked = images.shape
        for member in members:
            if member.steps.prepares:
                images = cast(Prepares, member).prepare(images, plain)
        if host.lattice_of(images)[0] != given[0]:
            host = host.shortened(images)
            run, plain.host = replace(run, host=host), host
        plans = plans_of(members, images, plain, training=self.training)
        index, batch, patches = self._enter(run, images, plain, resized=given if images.shape != asked else None)
        if run.tracer is not None and plain.spent is not None:
            run.tracer.cost.spend(plain.spent)
        initial, units = patches, batch.units
        if units is not None and units.decided == "together":
            initial *= units.each
        if keys is not None and units is not None and units.decided == "each":
            keys = unit_keys(keys, units)
        return run, index, batch, State(
            0, host.depth, initial, grid, keys, self.training, plans, tracer=run.tracer, notes={}, steps=given[0],
            still=math.prod(host.lattice_of(images)[1:]),
        )  # fmt: skip

    def _enter(
        self, run: _Pass, images: Tensor, plain: PlainModel, *, resized: tuple[int, int, int] | None
    ) -> tuple[int, TokenBatch, int]:
        """The first block to run, the tokens that enter it, and how many patches an image (a unit) had before any was
        chosen; ``resized``: ``Host.lattice_of`` the images as they came, where they now have other patches.
        """
        host, tracer = run.host, run.tracer
        known = None if run.shared is None else run.shared.latest(run.plan.first(host.depth))
        if known is None:
            detailed = run.shared is not None or bool(run.restorers) or (tracer is not None and tracer.detail)
            track = detailed or any(member.traits.uses_positions for member in run.members)
            embedded = host.embed(images, resized=resized is not None or run.resized, track=track)
            batch = embedded.with_origin() if detailed else embedded
            if resized is not None and track:  # told in the patches of the image as it was given
                batch = _as_given(host, batch, resized, host.lattice_of(images))
            known, patches = (host.embedded, _chosen(run, images, plain, embedded, batch)), _patches(host, embedded)
        else:
            known, patches = (known[0], _decided_by(host, known[1])), _patches(host, known[1])
        start, batch = known
        if tracer is not None:
            tracer.start(batch)
            tracer.cost.both(float(self._embedding_macs(host, images, resized=resized is not None)))
            for _ in range(host.embedded):
                tracer.after_block(batch)
            account(host, range(host.embedded, start), batch, tracer)
        return start, batch, patches

    def _check(self) -> tuple[Host, Plan]:
        """At each call: what was checked when the model was wrapped may have been changed since."""
        host, plan = self.host, self.plan
        host.check()
        check_plan(host, plan)
        if self.reducers.training != self.base.training:
            self.reducers.train(self.base.training)
        return host, plan

    def _block(self, run: _Pass, batch: TokenBatch, state: State, *, decide_only: bool) -> TokenBatch:
        """One block with what was placed in it."""
        reducer = run.plan.at.get(state.block)
        runs_again = run.host.checkpoints and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if runs_again and (reducer is None or reducer.only_decides):
            return checkpointed(partial(_run_block, run), batch, state)
        return _run_block(run, batch, state, decide_only=decide_only)

    def _embedding_macs(self, host: Host, images: Tensor, *, resized: bool) -> int:
        shape = tuple(images.shape[1:])
        if shape not in self._embed_macs:
            self._embed_macs[shape] = host.embed_macs(images, resized=resized)
        return self._embed_macs[shape]


@dataclass(frozen=True)
class _Pass:
    """What one forward pass goes by."""

    host: Host
    plan: Plan
    members: list[TokenReducer]
    tracer: Tracer | None
    shared: Shared | None
    restorer: Restorer | None = None
    resized: bool = False
    filler: Restorer | None = None  # puts the map together where a later stage begins
    fold: bool = False

    @property
    def restorers(self) -> list[Restorer]:
        return [each for each in (self.restorer, self.filler) if each is not None]


def _patches(host: Host, batch: TokenBatch) -> int:
    """Of an image, or a unit, of which nothing is gone yet."""
    assert batch.layout.uniform is not None
    return batch.layout.uniform[0] - host.prefix


def _decided_by(host: Host, batch: TokenBatch) -> TokenBatch:
    """Tokens that another placement left, of a host that may have decided on other units."""
    units = batch.units
    if units is None or units.decided == host.decided:
        return batch
    return replace(batch, units=replace(units, decided=host.decided, shown=[]))


def _as_given(host: Host, batch: TokenBatch, given: tuple[int, int, int], run: tuple[int, int, int]) -> TokenBatch:
    """The tokens with places among the patches of the images as they were given, which those that cover them carry."""
    assert batch.pos is not None
    units, device = batch.units, batch.x.device
    cover, at_centre = carriers(given[1:], run[1:], device)
    carrier, original = over_time(cover, at_centre, (given[0], run[0]))
    if units is not None:  # places are those of a frame, and its patches those of a frame that was given
        original, patches = at_centre, torch.arange(len(cover), device=device)
        stays = torch.tensor(spread_steps(given[0], run[0]), device=device)
        units = replace(units, places=stays[:, None] * len(cover) + patches, shown=[])
    place = original[batch.pos.clamp(min=0)]
    tables = host.relocated(batch.tables, original, len(cover) if units is not None else len(carrier))
    origin = None if batch.origin is None else batch.origin[:, carrier]
    place = place.where(batch.pos >= 0, batch.pos)
    return replace(batch, pos=place, tables=tables, units=units, origin=origin)


def _chosen(run: _Pass, images: Tensor, plain: PlainModel, embedded: TokenBatch, batch: TokenBatch) -> TokenBatch:
    """What is left of a batch when a reducer has chosen by the images; ``embedded``: with places as they are run."""
    host = run.host
    for member in run.members:
        decision = cast(Selects, member).select_patches(images, plain, embedded) if member.steps.selects else None
        if decision is not None:
            host.block(host.embedded).allow(member.name, decision.map)
            whole, batch = batch, advance(batch, decision, together=True)
            for restorer in run.restorers:
                restorer.after_block(host.embedded, whole, batch)
    return batch


def _run_block(run: _Pass, batch: TokenBatch, state: State, *, decide_only: bool = False) -> TokenBatch:
    if (whole := run.host.whole(state.block)) is not None:
        left = whole.run(batch)
        if state.tracer is not None:
            state.tracer.cost.both(whole.macs(batch))
            state.tracer.after_block(left)
        return left
    block, reducer = run.host.block(state.block), run.plan.at.get(state.block)
    if reducer is not None and reducer.steps.runs_blocks:
        batch = cast(RunsBlocks, reducer).block(block, batch, state)
        if state.tracer is not None:
            state.tracer.after_block(batch)
        return batch
    recorded = state.block in run.plan.recorded
    return run_block(
        block, batch, reducer, state, state.tracer, record_attention=recorded, decide_only=decide_only, fold=run.fold
    )


def checkpointed(run: Callable[[TokenBatch, State], TokenBatch], batch: TokenBatch, state: State) -> TokenBatch:
    """``run`` one block and keep only its input for the backward pass, which runs it again and finds the same.

    What is traced or noted the second time is nobody's: losses read the notes of the first, which reach the same graph.
    """
    noted = {owner: list(found) for owner, found in state.notes.items()}
    tracer = None if state.tracer is None else state.tracer.twin()
    states = [state]

    def again(x: Tensor) -> TokenBatch:
        known = states.pop() if states else replace(
            state,
            notes={owner: list(found) for owner, found in noted.items()},
            tracer=None if tracer is None else tracer.twin(),
        )  # fmt: skip
        return run(replace(batch, x=x), known)

    found: TokenBatch = checkpoint(again, batch.x, use_reentrant=False)
    return found


def plans_of(members: list[TokenReducer], images: Tensor, host: PlainModel, *, training: bool) -> ByReducer[Any]:
    """What each reducer plans ahead; in training also what it will compare its losses with."""
    plans: ByReducer[Any] = ByReducer()
    for member in members:
        if member.steps.plans:
            plans[member] = cast(Plans, member).plan(images, host)
        elif training and member.steps.plans_training:
            plans[member] = cast(PlansTraining, member).plan_training(images, host)
    return plans


def check_exportable(fast: ReducedViT) -> None:
    """Refuse what no exported graph can hold, and say what could be exported instead."""
    adaptive = sorted({member.name for member in fast.members() if member.traits.adaptive})
    if adaptive:
        raise ReducerError(
            f"{', '.join(adaptive)} keeps a different number of tokens in each image, and a graph that is exported or "
            "traced has fixed sizes; export a method of fixed count (topk, evit, tome, …), or run this one in PyTorch"
        )
