"""A small method that must be trained, for tests: a linear layer at each block scores the patches, the best stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import reducers.registry as registry
from reducers import Budget, Decision, State, TokenReducer
from reducers.kit.selection import keep_count, keep_highest

NAME = "taught_for_a_test"


class Taught(TokenReducer):
    """Scores every patch and asks that scores be near one; ``directions`` are rows of its layer, for shapes."""

    summary, source = "a linear score", "the tests"
    trained = True
    trained_as = "in a second"
    schedule = {"reducer_lr_scale": 10.0, "freeze": 0.5}  # noqa: RUF012

    def __init__(self, budget: Budget, *, directions: int = 1) -> None:
        super().__init__()
        self.budget = budget
        self.directions = directions
        self.scores = nn.ModuleDict()
        self.shares: list[float] = []

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        self.scores = nn.ModuleDict({str(block): nn.Linear(host.width, self.directions) for block in blocks})

    def train_phase(self, share: float, base: nn.Module) -> None:
        self.shares.append(share)

    def decide(self, signals: Any, state: State) -> Decision | None:
        score = self.scores[str(state.block)](signals.output()).mean(dim=1)
        state.note(self, score)
        kept = keep_highest(signals.layout, score.detach(), keep_count(signals.layout, self.budget, state, "floor"))
        return None if kept is None else Decision(kept)

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        return {"score": torch.stack([(score - 1).square().mean() for score in state.noted(self)]).mean()}


@contextmanager
def registered() -> Iterator[None]:
    """Known to the registry, for a while."""
    registry.register(NAME)(Taught)
    try:
        yield
    finally:
        del registry._METHODS[NAME]


def stage(blocks: list[int], **settings: Any) -> dict[str, Any]:
    """A stage of a placement, as plain data."""
    return {"at": blocks, "stack": [{"name": NAME, "budget": {"ratio": 0.7}, **settings}]}
