"""Whether a placement fits a model: its blocks are there, its reducers find what they need and get their parameters."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from reducers.errors import ReducerError
from reducers.placement import Placement
from reducers.reducer import TokenReducer
from reducers.stack import Stack
from reducers.vit.host import Host


def check_placement(base: VisionTransformer, placement: Placement) -> None:
    """Refuse what the model cannot do; reducers that have parameters make them, the first time."""
    placement.resolve(len(base.blocks))
    _check_class_token(base, placement)
    attach(base, placement)


def attach(base: VisionTransformer, placement: Placement) -> None:
    """Let every reducer that has parameters make them for this model; those that have them already keep them."""
    host = Host(base)
    joined: dict[int, tuple[TokenReducer, list[int]]] = {}
    for block, reducer in sorted(placement.blocks.items()):
        for member in reducer.members if isinstance(reducer, Stack) else [reducer]:
            joined.setdefault(id(member), (member, []))[1].append(block)
    for member, blocks in joined.values():
        member.join(host, tuple(blocks))


def _check_class_token(base: VisionTransformer, placement: Placement) -> None:
    """Refuse reducers that ask a class token the model has not, or that another reducer may have dropped by then."""
    dropper: tuple[int, TokenReducer] | None = None
    for block, reducer in sorted(placement.blocks.items()):
        for member in reducer.members if isinstance(reducer, Stack) else [reducer]:
            if member.traits.needs_class_token and not base.has_class_token:
                raise ReducerError(
                    f"{member.name} needs a class token and this model has none (global_pool={base.global_pool!r}); "
                    "use a score that needs none: score='attention_received', 'value_norm' or 'random', or ToMe"
                )
            if member.traits.needs_class_token and dropper is not None:
                raise ReducerError(
                    f"{member.name} at block {block} needs the class token, which {dropper[1].name} at block "
                    f"{dropper[0]} may have dropped; keep it there ({dropper[1].keeps_class_token_by}) or use "
                    "score='attention_received' here"
                )
            if member.traits.may_drop_class_token:
                if not base.has_class_token:
                    raise ReducerError(
                        f"{member.name} is asked to drop the class token, and this model has none "
                        f"(global_pool={base.global_pool!r}); use {member.keeps_class_token_by}"
                    )
                dropper = (block, member)
