"""Speed, measured: a reduced model and the plain one in turn, alone on all cores of the machine or on one whole GPU.

Absolute times depend on the machine and on what else it does; ratios of runs that took turns depend on neither. So each
round times both on the same images, and the speed-up is the median of the rounds' ratios, with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ablations.measure.context import TrialContext, device_name, use_exact_float32
from ablations.system import cores
from ablations.trial.stages import Stages
from ablations.trial.trial import Trial
from ablations.workloads.base import Workload
from reducers import reduce_tokens

ROUNDS = (9, 41)  # at least, at most
ENOUGH = 6.0  # seconds of rounds after which no more are begun
SHORTEST = 0.1  # seconds: what is faster is timed several times over, for the clock's sake
BATCHES = 4  # different ones, in turn: adaptive methods keep other tokens in other images


def measure_speed(trial: Trial, context: TrialContext, *, stages: Stages) -> dict[str, Any]:
    """The columns that a timed trial adds to its row; ``trial.batch`` images at a time, in float32.

    ``stages`` is the placement as it was evaluated, every setting that was sought written in.
    """
    use_exact_float32()
    dense, placement = context.model, stages.placement(context.facts.depth)
    if trial.training:
        from ablations.measure.finetune import finetuned

        tuned = finetuned(trial.training, context, host=trial.host)
        dense, placement = tuned.model, tuned.load_reducers(placement)
    reduced = reduce_tokens(dense, placement, host=trial.host.data).to(context.device).eval()
    images = [batch.to(context.device) for batch in spread_batches(context.workload, trial.batch)]
    with all_cores():
        dense_seconds, reduced_seconds = in_turn(dense, reduced, images, device=context.device)
        columns = columns_of(dense_seconds, reduced_seconds, batch=trial.batch)
        columns["device"] = device_name(context.device)
    columns["peak_memory_mb"] = peak_memory(reduced, images[0]) if context.device.type == "cuda" else None
    return columns


def columns_of(dense: Sequence[float], reduced: Sequence[float], *, batch: int) -> dict[str, Any]:
    """Rates and speed-up from seconds a batch, round by round; the first and third quartile as low and high."""
    ratios = [slow / fast for slow, fast in zip(dense, reduced, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "images_per_second": batch / statistics.median(reduced),
        "dense_images_per_second": batch / statistics.median(dense),
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "measured_batch": batch,
    }


@torch.inference_mode()
def in_turn(
    dense: nn.Module, reduced: nn.Module, images: Sequence[Tensor], *, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds a batch of each model, round by round; who begins changes from round to round."""
    both: list[Callable[[Tensor], Any]] = [dense, reduced]
    for model in both:  # warm-up: memory, caches, kernels chosen
        for batch in images[:2]:
            seconds(model, batch, device=device)
    times: tuple[list[float], list[float]] = ([], [])
    repeats = _repeats(seconds(reduced, images[0], device=device))
    started = time.perf_counter()
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() - started > ENOUGH:
            break
        batch = images[number % len(images)]
        for place in (0, 1) if number % 2 else (1, 0):
            times[place].append(seconds(both[place], batch, device=device, repeats=repeats))
    return times


def expected_seconds(*, reduced: float, dense: float) -> float:
    """How long ``in_turn`` takes with models that take so many seconds a batch."""
    repeats = _repeats(reduced)
    one = repeats * (reduced + dense)
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(ENOUGH / max(one, 1e-9)) + 1))
    return 2 * (reduced + dense) + reduced + rounds * one


def _repeats(reduced: float) -> int:
    """Passes that are timed as one."""
    return max(1, round(SHORTEST / max(reduced, 1e-6)))


def seconds(model: Callable[[Tensor], Any], images: Tensor, *, device: torch.device, repeats: int = 1) -> float:
    """Wall-clock seconds of one forward pass, the mean of ``repeats``, the device's queue drained on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        model(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def spread_batches(workload: Workload, batch: int, *, count: int = BATCHES) -> list[Tensor]:
    """Batches of images from all over the workload, (batch, C, H, W) each; images repeat where there are too few."""
    stride = max(1, len(workload) // batch)
    rows = [[(first + stride * place) % len(workload) for place in range(batch)] for first in range(count)]
    return [torch.cat([workload.batch(row, row + 1) for row in chosen]) for chosen in rows]


@contextmanager
def all_cores() -> Iterator[None]:
    """As many threads as this process may use cores; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def peak_memory(model: nn.Module, images: Tensor) -> float:
    """Peak of the GPU's memory in one forward pass, weights and images included, in MiB."""
    torch.cuda.reset_peak_memory_stats(images.device)
    model(images)
    torch.cuda.synchronize(images.device)
    return torch.cuda.max_memory_allocated(images.device) / 2**20
