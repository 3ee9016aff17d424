"""Every variant beside the dense model: cost, speed, memory, and the step of a training run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import peak_bytes
from benchmarks.subjects import Subject, folded_gmacs
from benchmarks.timing import Quartiles, Run, Turns, take_turns
from reducers import Placement, reduce_tokens

DENSE = "dense"
log = logging.getLogger(__name__)
_SINGLE_IMAGES = 8  # at batch 1 so many images take turns: the counts of one alone would be chance


@dataclass(frozen=True)
class Timing:
    """One variant beside the dense model. Ratios above 1 mean cheaper, faster; a memory ratio below 1 means smaller."""

    variant: str
    kind: str  # dense | packed | padded | masked | reference
    batch: int
    gmacs: float | None = None  # as executed by the packed run, the reducer's own included; mean over the images
    gmacs_ratio: float | None = None  # dense / this
    folded_gmacs: float | None = None  # what the kernel computes beside those, where it folds sizes into its products
    milliseconds: float | None = None  # median of one forward pass; comparable within one table only
    images_per_second: float | None = None
    speedup: float | None = None  # median over the pairs of dense time / this time
    speedup_low: float | None = None  # first and third quartile of the same
    speedup_high: float | None = None
    efficiency: float | None = None  # speed-up / GMACs ratio: 1 where time follows cost
    efficiency_lowest: float | None = None  # of the processes, where several were measured
    efficiency_highest: float | None = None
    peak_mib: float | None = None  # beyond weights and images
    memory_ratio: float | None = None  # this / dense
    training_batch: int | None = None
    training_speedup: float | None = None  # of forward and backward together, no optimiser
    training_low: float | None = None
    training_high: float | None = None
    seconds: list[float] | None = None  # of each turn …
    dense_seconds: list[float] | None = None  # … and of the dense model right beside it
    error: str | None = None  # why there is no measurement


@dataclass(frozen=True)
class Effort:
    """How often and what to measure."""

    rounds: int = 7
    warmup: int = 2
    memory: bool = True
    training_batch: int | None = None  # None: no training step


AT_BATCH_1 = 4
"""Times as many rounds at batch 1, which takes milliseconds and is noisier for it."""


Wrap = Callable[[nn.Module], Callable[[Tensor], Any]]  # such as torch.compile


def compare(
    model: Any,
    listed: Sequence[Subject],
    images: Tensor,
    *,
    batch: int,
    effort: Effort,
    wrap: Wrap | None = None,
    until: float = math.inf,
) -> list[Timing]:
    """Time all variants on batches of the images against the plain model, in turn.

    ``wrap``: what is done to every model first, the plain one included; ``until``: as ``take_turns`` takes it.
    """
    device = images.device
    groups = images[: (_SINGLE_IMAGES if batch == 1 else 1) * batch].split(batch)
    with torch.inference_mode():
        cost, folded, errors = _costs(model, listed, groups, batch)
        dense = model if wrap is None else wrap(model)
        runs: dict[str, Run] = {DENSE: lambda number: dense(groups[number % len(groups)])}
        runs |= {
            subject.name: _rotating(subject, model, groups, batch, wrap)
            for subject in listed
            if subject.name not in errors
        }
        rounds = effort.rounds * (AT_BATCH_1 if batch == 1 else 1)
        turns = take_turns(runs, device, rounds=rounds, warmup=max(effort.warmup, len(groups)), until=until)
        errors |= turns.errors
        alive = {name: run for name, run in runs.items() if name not in errors}
        peaks: dict[str, int] = {}
        if effort.memory:
            peaks = {name: peak_bytes(partial(run, 0), device) for name, run in alive.items()}
    training = None
    if effort.training_batch is not None and effort.training_batch <= batch and time.monotonic() < until:
        trained = [subject for subject in listed if subject.kind == "packed" and subject.name not in errors]
        training = _try_to_train(model, trained, images[: effort.training_batch], rounds=max(3, effort.rounds // 2))
    rows = []
    kinds = {DENSE: DENSE} | {subject.name: subject.kind for subject in listed}
    for name, kind in kinds.items():
        if name in errors:
            rows.append(Timing(name, kind, batch, error=errors[name]))
        else:
            row = _row(name, kind, batch, cost, turns, peaks, training, effort.training_batch)
            rows.append(replace(row, folded_gmacs=folded.get(name)))
    return rows


def _costs(
    model: Any, listed: Sequence[Subject], groups: Sequence[Tensor], batch: int
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Multiply-adds of one image, a mean over all that are timed; billions that a fold adds; why variants have none."""
    cost = {DENSE: float(reduce_tokens(model, Placement()).cost(groups[0][:1])[0])}
    folded: dict[str, float] = {}
    errors: dict[str, str] = {}
    for subject in listed:
        try:
            parts = [
                reduce_tokens(subject.network(model), subject.place(number * batch)).cost(group)
                for number, group in enumerate(groups)
            ]
            if subject.attention == "fold":
                _, trace = reduce_tokens(model, subject.place(0)).trace(groups[0])
                folded[subject.name] = folded_gmacs(subject, model, trace.tokens)
        except torch.OutOfMemoryError as error:
            errors[subject.name] = f"out of memory: {str(error).splitlines()[0]}"
            continue
        cost[subject.name] = float(torch.cat(parts).mean())
    return cost, folded, errors


def _rotating(subject: Subject, model: Any, groups: Sequence[Tensor], batch: int, wrap: Wrap | None = None) -> Run:
    """The variant on one batch of the images after the other."""
    built: list[Callable[[Tensor], Any]] = []
    for number in range(len(groups)):
        own = subject.build(model, number * batch).eval()
        built.append(own if wrap is None else wrap(own))
    return lambda number: built[number % len(built)](groups[number % len(groups)])


def _try_to_train(model: Any, listed: Sequence[Subject], images: Tensor, *, rounds: int) -> Turns | None:
    try:
        return train(model, listed, images, rounds=rounds)
    except torch.OutOfMemoryError:
        log.warning("no training step: the dense model runs out of memory at batch %d", len(images))
        return None


def train(model: Any, listed: Sequence[Subject], images: Tensor, *, rounds: int) -> Turns:
    """Time forward and backward together; the optimiser would be the same for all."""
    labels = torch.arange(len(images), device=images.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(run: nn.Module) -> Run:
        def once(number: int) -> None:
            for parameter in parameters:
                parameter.grad = None
            logits = run(images).float()
            F.cross_entropy(logits, labels % logits.shape[1]).backward()

        return once

    runs = {DENSE: step(model)} | {subject.name: step(subject.build(model, 0).eval()) for subject in listed}
    try:
        with torch.enable_grad():
            return take_turns(runs, images.device, rounds=rounds, warmup=1)
    finally:
        for parameter in parameters:
            parameter.grad = None


def _row(
    name: str,
    kind: str,
    batch: int,
    cost: dict[str, float],
    turns: Turns,
    peaks: dict[str, int],
    training: Turns | None,
    training_batch: int | None,
) -> Timing:
    speed, ratio, middle = turns.ratio(name), cost[DENSE] / cost[name], turns.median(name)
    step: Quartiles | None = None
    if training is not None and name in training.seconds:
        step = training.ratio(name)
    return Timing(
        variant=name,
        kind=kind,
        batch=batch,
        gmacs=cost[name] / 1e9,
        gmacs_ratio=ratio,
        milliseconds=1e3 * middle,
        images_per_second=batch / middle,
        speedup=speed.median,
        speedup_low=speed.low,
        speedup_high=speed.high,
        efficiency=speed.median / ratio,
        peak_mib=peaks[name] / 2**20 if name in peaks else None,
        memory_ratio=peaks[name] / peaks[DENSE] if name in peaks else None,
        training_batch=None if step is None else training_batch,
        training_speedup=None if step is None else step.median,
        training_low=None if step is None else step.low,
        training_high=None if step is None else step.high,
        seconds=[round(own, 6) for own in turns.seconds[name]],
        dense_seconds=[round(dense, 6) for dense in turns.beside[name]],
    )


def records(table: Sequence[Timing]) -> list[dict[str, Any]]:
    """The table as plain data."""
    return [asdict(row) for row in table]
