"""Several reducers at one block, one after the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals


@register("stack")
class Stack(TokenReducer):
    """``Stack(EViT(Ratio(0.7)), ATS(Ratio(0.7)))``: the second decides on what the first leaves.

    Signals reach the later ones transported through the maps so far; the block's projection and MLP run once, on
    what remains.
    """

    summary = "several reducers at one block, one after the other"
    source = "this project"

    def __init__(self, *reducers: TokenReducer, stack: list[TokenReducer] | None = None) -> None:
        super().__init__()
        parts: list[TokenReducer] = []
        for reducer in [*reducers, *(stack if isinstance(stack, list) else [])]:
            if not isinstance(reducer, TokenReducer):
                raise ReducerError(f"Stack takes reducers, first to last; got {reducer!r}")
            parts.extend(reducer.members if isinstance(reducer, Stack) else [reducer])
        if not parts:
            raise ReducerError("Stack() is empty; give it the reducers to apply, first to last")
        for reducer in parts:
            if not reducer.only_decides:
                raise ReducerError(f"{reducer.name} does more than decide and cannot be stacked at one block")
        sites = [reducer.traits.site for reducer in parts]
        if sites != sorted(sites, key="input attention".index):
            raise ReducerError(
                "reducers at the input site act before the block's attention: put them first in the stack"
            )
        self.reducers = nn.ModuleList(parts)
        self.traits = Traits.merged(reducer.traits for reducer in parts)

    @property
    def members(self) -> list[TokenReducer]:
        return list(self.reducers)  # type: ignore[arg-type]  # a ModuleList of reducers

    def decide(self, signals: Signals, state: State) -> Decision | None:
        raise AssertionError("the runtime asks the members of a stack one by one")

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "stack": [reducer.spec() for reducer in self.members]}
