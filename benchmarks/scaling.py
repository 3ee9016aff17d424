"""How time and memory grow with the number of tokens and with the batch, and what the deciding itself takes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counts import Counts
from benchmarks.memory import peak_bytes
from benchmarks.profiling import Wrapped, wrapped
from benchmarks.speed import DENSE
from benchmarks.subjects import Subject, ats, packed
from benchmarks.timing import Run, Turns, take_turns
from reducers import Drop, EViT, Placement, Ratio, ToMe, at, every, reduce_tokens
from reducers.decision import Decision
from reducers.reducer import State, TokenReducer
from reducers.signals import Signals


@dataclass(frozen=True)
class Point:
    """One variant at one size."""

    variant: str
    pixels: int
    tokens: int  # patch tokens entering block 0
    batch: int
    gmacs: float | None = None  # of one image, as executed
    milliseconds: float | None = None  # of one image: the median forward pass by the batch
    speedup: float | None = None  # median over the pairs of dense time / this time
    peak_mib: float | None = None  # of the whole batch, beyond weights and images
    memory_ratio: float | None = None  # this / dense
    deciding: float | None = None  # share of the time that goes when the decisions are known beforehand
    error: str | None = None


class Decided(Wrapped):
    """A reducer with its decisions known: asked once a block, from then on it answers as it did then.

    What a run with it saves is what deciding costs: scores, sorting, matching, index work and, for adaptive methods,
    waiting for the counts. Keys, values and attention are the block's own work and stay; so does carrying the decision
    out.
    """

    name = "decided"

    def __init__(self, inner: TokenReducer) -> None:
        super().__init__(inner)
        self._known: dict[int, Decision | None] = {}

    def decide(self, signals: Signals, state: State) -> Decision | None:
        if state.block not in self._known:
            self._known[state.block] = self.inner.decide(signals, state)
        return self._known[state.block]


def methods(model: Any, counts: Counts) -> list[Subject]:
    """ToMe, EViT and ATS, their settings in proportion to the number of tokens."""
    depth, tokens = len(model.blocks), model.patch_embed.num_patches
    first = depth // 4
    stages, rest = [first, depth // 2, 3 * depth // 4], list(range(first, depth))
    r = max(1, round(13 * tokens / 196 * 12 / depth))
    tome, evit = every(1, ToMe(Drop(r)), depth=depth), at(stages, EViT(Ratio(0.7)))
    return [
        packed("ToMe", lambda start: tome),
        packed("EViT", lambda start: evit),
        packed("ATS", ats(model, rest, 108, counts)),
    ]


def measure(model: Any, counts: Counts, images: Tensor, *, rounds: int = 5, warmup: int = 2) -> list[Point]:
    """Dense and reduced on these images, in turn, each reducer with its decisions live and with them known."""
    device, batch = images.device, len(images)
    shape = {"pixels": images.shape[-1], "tokens": model.patch_embed.num_patches, "batch": batch}
    listed = methods(model, counts)
    with torch.inference_mode():
        runs: dict[str, Run] = {DENSE: lambda number: model(images)}
        cost = {DENSE: float(reduce_tokens(model, Placement()).cost(images[:1])[0])}
        for subject in listed:
            live = subject.build(model, 0).eval()
            known = reduce_tokens(model, decided(subject.place(0))).eval()
            runs[subject.name] = _on(live, images)
            runs[_known(subject.name)] = _on(known, images)
        turns = take_turns(runs, device, rounds=rounds, warmup=warmup)
        points = []
        names = [DENSE, *(subject.name for subject in listed)]
        peaks = {name: peak_bytes(partial(runs[name], 0), device) for name in names if name in turns.seconds}
        for name in names:
            if name in turns.errors or _known(name) in turns.errors:
                error = turns.errors.get(name) or turns.errors[_known(name)]
                points.append(Point(name, **shape, error=error))
                continue
            if name != DENSE:
                cost[name] = float(_placement(listed, name, model).cost(images).mean())
            points.append(
                Point(
                    name,
                    **shape,
                    gmacs=cost[name] / 1e9,
                    milliseconds=1e3 * turns.median(name) / batch,
                    speedup=turns.ratio(name).median,
                    peak_mib=peaks[name] / 2**20,
                    memory_ratio=peaks[name] / peaks[DENSE],
                    deciding=None if name == DENSE else _share(turns, name),
                )
            )
    return points


def decided(placement: Placement) -> Placement:
    """The placement with every reducer's decisions remembered."""
    return wrapped(placement, Decided)


def _on(run: nn.Module, images: Tensor) -> Run:
    return lambda number: run(images)


def _share(turns: Turns, name: str) -> float:
    """Share of a variant's time that deciding takes: what it saves to know the decisions."""
    return 1 - turns.ratio(name).median / turns.ratio(_known(name)).median


def _known(name: str) -> str:
    return f"{name}, decided"


def _placement(listed: Sequence[Subject], name: str, model: Any) -> Any:
    return next(reduce_tokens(model, subject.place(0)) for subject in listed if subject.name == name)


def records(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points as plain data."""
    return [asdict(point) for point in points]
