"""The loop over blocks: holds an untouched timm model and drives it, with reducers where they were placed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from reducers.base import State, TokenReducer
from reducers.cost import linear_macs
from reducers.errors import ReducerError
from reducers.noise import image_keys
from reducers.placement import Placement
from reducers.stack import Stack
from reducers.tokens import TokenBatch
from reducers.trace import Trace, Tracer
from reducers.vit.adapter import check_model
from reducers.vit.block import run_block
from reducers.vit.head import classify


def reduce_tokens(model: nn.Module, placement: Placement) -> ReducedViT:
    """Drive a plain timm ViT with reducers in it.

    The model is neither copied nor changed: it stays usable, and every variant of it shares its weights.

    Raises:
        UnsupportedModel: a model whose blocks this runtime does not restate exactly.
        ReducerError: a block outside the network, or a reducer that needs what the model lacks.
    """
    return ReducedViT(model, placement)


class ReducedViT(nn.Module):
    """A timm ViT and where its tokens are reduced. ``forward`` gives logits; ``trace`` also what happened and what
    it cost.
    """

    def __init__(self, base: nn.Module, placement: Placement) -> None:
        super().__init__()
        check_model(base)
        assert isinstance(base, VisionTransformer)
        if not isinstance(placement, Placement):
            raise ReducerError(
                f"reduce_tokens needs a placement such as at([3, 6, 9], EViT(Ratio(0.7))); got {placement!r}"
            )
        placement.check(len(base.blocks))
        _check_class_token(base, placement)
        self.base = base
        self.placement = placement
        self.reducers = nn.ModuleDict({str(block): reducer for block, reducer in sorted(placement.blocks.items())})
        self.training = base.training  # not self.train(): the base keeps the modes its user gave its parts
        self.reducers.train(base.training)
        self._embed_macs: dict[tuple[int, ...], int] = {}

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        return self._run(images, trace=False)[0]

    def trace(self, images: Tensor) -> tuple[Tensor, Trace]:
        """As ``forward``, and a trace of every image's tokens and cost."""
        logits, trace = self._run(images, trace=True)
        assert trace is not None
        return logits, trace

    def members(self) -> list[TokenReducer]:
        """Every reducer that acts, a stack's members one by one."""
        found: list[TokenReducer] = []
        for reducer in self.placement.blocks.values():
            for member in reducer.members if isinstance(reducer, Stack) else [reducer]:
                if not any(member is known for known in found):
                    found.append(member)
        return found

    def _run(self, images: Tensor, *, trace: bool) -> tuple[Any, Trace | None]:
        base, members = self.base, self.members()
        keys = image_keys(images) if any(member.uses_random for member in members) else None
        for prepare in _steps(members, "prepare"):
            images = prepare(images)
        plans = {id(member): member.plan(images, base) for member in members if member.plan is not None}
        embedded = base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))
        prefix = base.num_prefix_tokens
        batch = TokenBatch.from_images(embedded, prefix=prefix, has_class_token=base.has_class_token, track=trace)
        tracer = Tracer.start(batch) if trace else None
        if tracer is not None:
            tracer.cost.both(float(self._embedding_macs(images)))
        depth, initial = len(base.blocks), embedded.shape[1] - prefix
        for index, block in enumerate(base.blocks):
            assert isinstance(block, Block)  # check_model saw to it
            reducer = self.placement.blocks.get(index)
            state = State(index, depth, initial, keys, self.training, plans, tracer=tracer)
            if reducer is not None and reducer.block is not None:
                batch = reducer.block(block, batch, state)
                if tracer is not None:
                    tracer.after_block(batch)
            else:
                recorded = _asks_previous(self.placement.blocks.get(index + 1))
                batch = run_block(block, batch, reducer, state, tracer, record_attention=recorded)
        state = State(depth, depth, initial, keys, self.training, plans)
        for finish in _steps(members, "finish"):
            batch = finish(batch, state)
        logits = classify(base, batch, base.norm(batch.x), tracer)
        return logits, None if tracer is None else tracer.finish()

    def _embedding_macs(self, images: Tensor) -> int:
        shape = tuple(images.shape[1:])
        if shape not in self._embed_macs:
            self._embed_macs[shape] = linear_macs(self.base.patch_embed, images[:1])
        return self._embed_macs[shape]


def _steps(members: list[TokenReducer], step: str) -> list[Callable[..., Any]]:
    return [getattr(member, step) for member in members if getattr(member, step) is not None]


def _asks_previous(reducer: TokenReducer | None) -> bool:
    members = reducer.members if isinstance(reducer, Stack) else [reducer]
    return any(member is not None and member.uses_previous_attention for member in members)


def _check_class_token(base: VisionTransformer, placement: Placement) -> None:
    """Refuse reducers that ask a class token the model has not, or that another reducer may have dropped by then."""
    dropper: tuple[int, TokenReducer] | None = None
    for block, reducer in sorted(placement.blocks.items()):
        for member in reducer.members if isinstance(reducer, Stack) else [reducer]:
            if member.needs_class_token and not base.has_class_token:
                raise ReducerError(
                    f"{member.name} needs a class token and this model has none (global_pool={base.global_pool!r}); "
                    "use a score that needs none: score='attention_received', 'value_norm' or 'random', or ToMe"
                )
            if member.needs_class_token and dropper is not None:
                raise ReducerError(
                    f"{member.name} at block {block} needs the class token, which {dropper[1].name} at block "
                    f"{dropper[0]} may have dropped; keep it there (keep_class_token=True) or use "
                    "score='attention_received' here"
                )
            if member.may_drop_class_token:
                if not base.has_class_token:
                    raise ReducerError("keep_class_token=False asks to drop a class token, and this model has none")
                dropper = (block, member)
