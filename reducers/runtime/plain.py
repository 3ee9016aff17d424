"""What a reducer that prepares images or plans ahead may ask of the unreduced model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from reducers.decision import Decision
from reducers.frames import spread_steps
from reducers.hosts.protocol import Grid, Host, Stage
from reducers.reducer import State, TokenReducer
from reducers.runtime.block import run_block
from reducers.signals import Signals
from reducers.tokens import TokenBatch
from reducers.trace import Tracer


def carriers(original: Grid, run: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between two grids over one image: the patch of the grid as run that covers each original one's centre (N0,),
    and the original patch at the centre of each one as run (N,).
    """

    def centres(of: Grid, among: Grid) -> Tensor:
        rows, columns = (
            ((torch.arange(n, device=device) * 2 + 1) * m).div(2 * n, rounding_mode="floor")
            for n, m in zip(of, among, strict=True)
        )
        return (rows[:, None] * among[1] + columns).flatten()

    return centres(original, run), centres(run, original)


def over_time(carrier: Tensor, original: Tensor, steps: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What ``carriers`` says of one grid, of clips of so many of them one below the other: as they were given, and as
    they are run. A step that is left out is carried by the one before it that stays.
    """
    given, run = steps
    if given == run == 1:
        return carrier, original
    stays = torch.tensor(spread_steps(given, run), device=carrier.device)
    last = torch.bucketize(torch.arange(given, device=carrier.device), stays, right=True) - 1
    here, there = (last[:, None] * len(original) + carrier), (stays[:, None] * len(carrier) + original)
    return here.flatten(), there.flatten()


class Listener(TokenReducer):
    """Reduces nothing; keeps what it ``hear``s of the signals of every block it is asked at."""

    name = "listener"

    def __init__(self, hear: Callable[[Signals], Any]) -> None:
        super().__init__()
        self.hear = hear
        self.heard: list[Any] = []

    def decide(self, signals: Signals, state: State) -> Decision | None:
        self.heard.append(self.hear(signals))
        return None


def run_unreduced(
    host: Host, batch: TokenBatch, listener: Listener, tracer: Tracer | None = None
) -> Iterator[TokenBatch]:
    """The tokens that leave each block behind the embedding; where they are counted, those of the last block are not
    computed.
    """
    depth, training = host.depth, host.model.training
    initial = batch.layout.longest - host.prefix
    for index in range(host.embedded, depth):
        state = State(index, depth, initial, training=training)
        batch = run_block(
            host.block(index), batch, listener, state, tracer, decide_only=tracer is not None and index == depth - 1
        )
        yield batch


def _facts(host: Host, stage: Stage) -> dict[str, Any]:
    """The facts of a host that are a stage's."""
    patches = None if stage.grid is None else stage.grid[0] * stage.grid[1]
    shape = (stage.width, stage.heads, host.depth, stage.prefix, stage.grid)
    return {
        "width": stage.width, "heads": stage.heads, "prefix": stage.prefix, "has_class_token": stage.has_class_token,
        "grid": stage.grid, "patches": patches, "shape": shape,
    }  # fmt: skip


class PlainModel:
    """The model without its reducers: every fact of its ``Host``, and its attention. Made for one forward pass.

    What is computed for a reducer here is booked as that reducer's own work. ``stage``: the one whose sizes are told as
    the model's, where it has several.
    """

    def __init__(self, host: Host, stage: Stage | None = None) -> None:
        self.host = host
        self._told: dict[str, Any] = {} if stage is None else _facts(host, stage)
        self.spent: Tensor | None = None  # (B,) multiply-adds of what was asked so far

    def __getattr__(self, name: str) -> Any:
        if name in ("host", "_told"):  # of a copy that is being made
            raise AttributeError(name)
        return self._told[name] if name in self._told else getattr(self.host, name)

    @property
    def base(self) -> Any:
        """The library's model itself. What a method can learn from the facts of a host, it should."""
        return self.host.model

    def spend(self, macs: Tensor) -> None:
        """Book multiply-adds (B,)."""
        self.spent = macs if self.spent is None else self.spent + macs

    def attention_maps(self, images: Tensor, *, book: bool = True) -> list[Tensor]:
        """Head-mean attention of every block of the plain model behind its embedding (``Host.embedded``), (B, L, L)
        each: rows are queries. Without gradients.

        Runs the whole model once; the embedding, which the pass needs as well, is not booked again. ``book=False``: as
        if the maps were there for nothing.
        """
        listener, tracer = Listener(lambda signals: signals.attention().mean(dim=1)), Tracer(detail=False)
        with torch.no_grad():
            batch = self.host.embed(images)
            tracer.start(batch)
            for _ in run_unreduced(self.host, batch, listener, tracer):
                pass
        if book:
            self.spend(tracer.cost.executed)
        return listener.heard
