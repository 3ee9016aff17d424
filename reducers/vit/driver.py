"""The loop over blocks: holds an untouched timm model and drives it, with reducers where they were placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reducers.cost import linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.noise import image_keys
from reducers.placement import Placement
from reducers.reducer import ByReducer, Finishes, Plans, PlansTraining, Prepares, RunsBlocks, State, TokenReducer
from reducers.stack import Stack
from reducers.tokens import TokenBatch
from reducers.trace import Trace, Tracer
from reducers.vit.adapter import check_model
from reducers.vit.block import account, run_block, run_plain, runs_as_it_is
from reducers.vit.fits import check_placement
from reducers.vit.head import classify, head_macs
from reducers.vit.host import Host, carriers, embed, entrance, grid_of
from reducers.vit.shared import Shared


def reduce_tokens(model: nn.Module, placement: Placement) -> ReducedViT:
    """Drive a plain timm ViT with reducers in it.

    The model is neither copied nor changed: it stays usable, and every variant of it shares its weights. What is done
    to it afterwards counts at the next call: other weights, parts, modes or settings. There is one mode, the model's:
    ``eval()`` and ``train()`` of the model and of the reduced one are the same. ``set_grad_checkpointing`` of the model
    is honoured; see ``ReducedViT``.

    Raises:
        UnsupportedModel: a model whose blocks this runtime does not restate exactly; also at a call, after a change.
        ReducerError: a block outside the network, or a reducer that needs what the model lacks.
    """
    return ReducedViT(model, placement)


class ReducedViT(nn.Module):
    """A timm ViT and where its tokens are reduced. ``forward`` gives logits; ``trace`` also what happened and what
    it cost.

    ``training`` is the base's own, and the reducers follow it at each call. With ``base.set_grad_checkpointing()``
    every block keeps only its input for the backward pass and runs again there, with the random numbers it had, but
    for blocks of reducers that do more than decide (``only_decides``). On a device whose kernels add up in any order,
    a block that runs again may decide near ties otherwise; under ``torch.compile`` the compiler decides what it keeps.
    """

    def __init__(self, base: nn.Module, placement: Placement) -> None:
        super().__init__()
        if isinstance(base, ReducedViT):
            raise UnsupportedModel(
                "the model is reduced already; join the placements: reduce_tokens(model.base, first | second)"
            )
        check_model(base)
        assert isinstance(base, VisionTransformer)
        if not isinstance(placement, Placement):
            raise ReducerError(
                f"reduce_tokens needs a placement such as at([3, 6, 9], EViT(Ratio(0.7))); got {placement!r}"
            )
        placement = placement.resolve(len(base.blocks))
        self.base = base
        self.reducers = nn.ModuleDict()
        check_placement(base, placement)
        self.reducers.update({str(block): reducer for block, reducer in sorted(placement.blocks.items())})
        self.reducers.train(base.training)
        self._embed_macs: dict[tuple[int, ...], int] = {}

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

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # documented
            check_exportable(self)
        return self._run(images, None)

    def unchecked(self, images: Tensor) -> Tensor:
        """``forward``, for a tracer that only wants to see the operations of these images."""
        logits: Tensor = self._run(images, None)
        return logits

    def trace(self, images: Tensor, shared: Shared | None = None) -> tuple[Tensor, Trace]:
        """As ``forward``, and a trace of every image's tokens and cost.

        ``shared``: what other placements on the same images have computed of the blocks before ``first_block``.
        """
        tracer = Tracer()
        logits = self._run(images, tracer, shared)
        return logits, tracer.finish()

    @torch.no_grad()
    def cost(self, images: Tensor, shared: Shared | None = None) -> Tensor:
        """``trace(images)[1].macs``, (B,) float64, without running what comes after the last reducer."""
        tracer = Tracer(detail=False)
        self._run(images, tracer, shared, cost_only=True)
        return tracer.cost.executed

    @property
    def first_block(self) -> int:
        """The first block that does not compute what the plain model computes there; the depth if there is none."""
        return min(self._acting(), default=len(self.base.blocks))

    def _acting(self) -> set[int]:
        """Blocks with a reducer in them, or before one that asks for what happened there."""
        placed = self.placement.blocks
        return {*placed, *(block - 1 for block, reducer in placed.items() if _asks_previous(reducer))}

    def members(self) -> list[TokenReducer]:
        """Every reducer that acts, a stack's members one by one."""
        found: list[TokenReducer] = []
        for reducer in self.placement.blocks.values():
            for member in reducer.members if isinstance(reducer, Stack) else [reducer]:
                if not any(member is known for known in found):
                    found.append(member)
        return found

    def _run(
        self, images: Tensor, tracer: Tracer | None, shared: Shared | None = None, *, cost_only: bool = False
    ) -> Any:
        base, acting = self.base, self._acting()
        self._check()
        if any(member.steps.prepares or member.steps.plans for member in self.members()):
            shared = None  # they look at the images in their own way first
        index, batch, state = self._begin(images, tracer, shared)
        depth = end = len(base.blocks)
        first = min(acting, default=depth)
        if cost_only:  # the last reducer only decides, and nothing runs after it
            end = max((int(block) for block in self.reducers), default=-1) + 1
        while index < end:
            if shared is not None and index == first:
                shared.put(index, batch)
            idle = min((block for block in acting if block >= index), default=end)
            if idle > index and runs_as_it_is(batch):
                batch = run_plain(base.blocks[index:idle], batch, tracer)
                index = idle
            else:
                batch = self._block(batch, replace(state, block=index), decide_only=cost_only and index == end - 1)
                index += 1
        if tracer is not None:
            account(base.blocks[index:], batch, tracer)
            tracer.cost.both(head_macs(base, batch.layout))
        if cost_only:
            return None
        for member in self.members():
            if member.steps.finishes:
                batch = cast(Finishes, member).finish(batch, replace(state, block=depth))
        return classify(base, batch, base.norm(batch.x))

    def _begin(self, images: Tensor, tracer: Tracer | None, shared: Shared | None) -> tuple[int, TokenBatch, State]:
        """All that comes before the blocks: the first one to run, the tokens that enter it, what reducers may know."""
        base, members = self.base, self.members()
        if shared is not None:
            shared.claim(base, images)
        keys = self._image_keys(images, shared)
        host, asked, grid = Host(base), images.shape, grid_of(base, images)
        for member in members:
            if member.steps.prepares:
                images = cast(Prepares, member).prepare(images, host)
        plans = plans_of(members, images, host, training=self.training)
        index, batch = self._enter(images, shared, tracer, resized=grid if images.shape != asked else None)
        assert batch.layout.uniform is not None
        if tracer is not None and host.spent is not None:
            tracer.cost.spend(host.spent)
        initial = batch.layout.uniform[0] - base.num_prefix_tokens
        return index, batch, State(
            0, len(base.blocks), initial, grid, keys, self.training, plans, tracer=tracer, notes={}
        )  # fmt: skip

    def _image_keys(self, images: Tensor, shared: Shared | None) -> Tensor | None:
        if not any(member.traits.uses_random for member in self.members()):
            return None
        return image_keys(images) if shared is None else shared.image_keys(images)

    def _enter(
        self, images: Tensor, shared: Shared | None, tracer: Tracer | None, *, resized: tuple[int, int] | None
    ) -> tuple[int, TokenBatch]:
        """The first block to run and the tokens that enter it; ``resized``: the grid of the images as they came, where
        they now have another.
        """
        base, carrier = self.base, None
        front = entrance(base, resized=resized is not None)
        known = None if shared is None else shared.latest(self.first_block)
        if known is None:
            embedded = embed(front, images)
            track = shared is not None or (tracer is not None and tracer.detail)
            track = track or any(member.traits.uses_positions for member in self.members())
            known = (
                0,
                TokenBatch.from_images(
                    embedded, prefix=base.num_prefix_tokens, has_class_token=base.has_class_token, track=track
                ),
            )
        start, batch = known
        if (
            resized is not None and batch.pos is not None
        ):  # provenance is told in the patches of the image as it was given
            carrier, original = carriers(resized, grid_of(base, images), images.device)
            place = original[batch.pos.clamp(min=0)]
            batch = replace(batch, pos=place.where(batch.pos >= 0, batch.pos))
        if tracer is not None:
            tracer.start(batch, carrier)
            tracer.cost.both(float(self._embedding_macs(front, images)))
            account(base.blocks[:start], batch, tracer)
        return start, batch

    def _check(self) -> None:
        """At each call: what was checked when the model was wrapped may have been changed since."""
        check_model(self.__dict__["_modules"]["base"])  # by attribute, an exporter may give a stand-in of another type
        check_placement(self.base, self.placement)
        if self.reducers.training != self.base.training:
            self.reducers.train(self.base.training)

    def _at(self, block: int) -> TokenReducer | None:
        reducer = self.reducers._modules.get(str(block))
        assert reducer is None or isinstance(reducer, TokenReducer)
        return reducer

    def _block(self, batch: TokenBatch, state: State, *, decide_only: bool) -> TokenBatch:
        """One block with what was placed in it."""
        reducer = self._at(state.block)
        runs_again = self.base.grad_checkpointing and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if runs_again and (reducer is None or reducer.only_decides):
            return checkpointed(self._run_block, batch, state)
        return self._run_block(batch, state, decide_only=decide_only)

    def _run_block(self, batch: TokenBatch, state: State, *, decide_only: bool = False) -> TokenBatch:
        block, reducer = self.base.blocks[state.block], self._at(state.block)
        assert isinstance(block, Block)  # check_model saw to it
        if reducer is not None and reducer.steps.runs_blocks:
            batch = cast(RunsBlocks, reducer).block(block, batch, state)
            if state.tracer is not None:
                state.tracer.after_block(batch)
            return batch
        recorded = _asks_previous(self._at(state.block + 1))
        return run_block(block, batch, reducer, state, state.tracer, record_attention=recorded, decide_only=decide_only)

    def _embedding_macs(self, front: VisionTransformer, images: Tensor) -> int:
        shape = tuple(images.shape[1:])
        if shape not in self._embed_macs:
            self._embed_macs[shape] = linear_macs(front.patch_embed, images[:1])
        return self._embed_macs[shape]


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


def plans_of(members: list[TokenReducer], images: Tensor, host: Host, *, training: bool) -> ByReducer[Any]:
    """What each reducer plans ahead; in training also what it will compare its losses with."""
    plans: ByReducer[Any] = ByReducer()
    for member in members:
        if member.steps.plans:
            plans[member] = cast(Plans, member).plan(images, host)
        elif training and member.steps.plans_training:
            plans[member] = cast(PlansTraining, member).plan_training(images, host)
    return plans


def _asks_previous(reducer: TokenReducer | None) -> bool:
    members = reducer.members if isinstance(reducer, Stack) else [reducer]
    return any(member is not None and member.traits.uses_previous_attention for member in members)


def check_exportable(fast: ReducedViT) -> None:
    """Refuse what no exported graph can hold, and say what could be exported instead."""
    adaptive = sorted({member.name for member in fast.members() if member.traits.adaptive})
    if adaptive:
        raise ReducerError(
            f"{', '.join(adaptive)} keeps a different number of tokens in each image, and a graph that is exported or "
            "traced has fixed sizes; export a method of fixed count (topk, evit, tome, …), or run this one in PyTorch"
        )
