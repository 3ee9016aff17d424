"""What a placement fixes for every pass, worked out once: who acts where, and what each block must do for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from reducers.reducer import TokenReducer
from reducers.runtime.block import members_of


@dataclass(frozen=True)
class Plan:
    """Of the reducers as they are in a ``ReducedViT``; made anew when one is put in another's place."""

    parts: tuple[object, ...]  # the reducers and members of stacks that it was made of, by block
    at: Mapping[int, TokenReducer]
    acts: tuple[tuple[int, TokenReducer], ...]  # block and member, in the order in which they act
    members: tuple[TokenReducer, ...]  # each once
    blocks: Mapping[TokenReducer, tuple[int, ...]]  # where each member acts
    acting: tuple[int, ...]  # blocks that do not compute what the plain model computes there, ascending
    recorded: frozenset[int]  # blocks of which the next one's reducer asks the attention received

    @classmethod
    def of(cls, reducers: nn.ModuleDict) -> Plan:
        """Read off the reducers, which alone own the placement."""
        given: Any = reducers
        at: dict[int, TokenReducer] = {int(block): given[block] for block in sorted(given, key=int)}
        acts = tuple((block, member) for block, reducer in at.items() for member in members_of(reducer))
        blocks: dict[TokenReducer, tuple[int, ...]] = {}
        for block, member in acts:
            blocks[member] = (*blocks.get(member, ()), block)
        recorded = frozenset(block - 1 for block, member in acts if member.traits.uses_previous_attention)
        acting = tuple(sorted({*at, *recorded}))
        return cls(_parts(reducers), at, acts, tuple(blocks), blocks, acting, recorded)

    def fits(self, reducers: nn.ModuleDict) -> bool:
        """Whether the reducers are still those that it was made of."""
        found = _parts(reducers)
        return len(found) == len(self.parts) and all(a is b or a == b for a, b in zip(found, self.parts, strict=True))

    def first(self, depth: int) -> int:
        """The first block that acts; the depth if there is none."""
        return self.acting[0] if self.acting else depth

    def next(self, block: int, end: int) -> int:
        """The first block from this one on that acts; ``end`` if there is none."""
        return next((each for each in self.acting if each >= block), end)


def _parts(reducers: nn.ModuleDict) -> tuple[object, ...]:
    """Names and reducers of a dictionary, and the members of its stacks: all that a plan is made of."""
    parts: list[object] = []
    for block, reducer in reducers._modules.items():
        parts += block, reducer
        inner = reducer._modules.get("reducers") if reducer is not None else None
        if isinstance(inner, nn.ModuleList):
            parts += inner._modules.values()
    return tuple(parts)
