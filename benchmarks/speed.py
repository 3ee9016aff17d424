"""Time reduced models against the dense one, in turn, in one process.

Absolute times depend on the machine and on what else it does; ratios of runs that took turns depend on neither.
Each round times every variant once, in an order that changes from round to round, and the ratio to the dense model
is taken within the round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reducers import ATS, Count, Drop, EViT, Placement, RandomDrop, Ratio, ToMe, TopK, at, every, reduce_tokens


@dataclass(frozen=True)
class Timing:
    """One variant beside the dense model. Ratios above 1 mean: cheaper, faster."""

    variant: str
    batch: int
    gmacs: float  # as executed, the reducer's own included; mean over the images
    gmacs_ratio: float  # dense / this
    images_per_second: float  # median over the rounds; comparable within one table only
    speedup: float  # median over the rounds of dense time / this time
    speedup_low: float  # first and third quartile of the same
    speedup_high: float
    efficiency: float  # speed-up / GMACs ratio: 1 where time follows cost


def variants(depth: int = 12) -> dict[str, Placement]:
    """The methods at the settings their papers print, and ATS at several costs."""
    return {
        "top-K, K = 98 at block 3": at(3, TopK(Ratio(0.5, of="initial"))),
        "random, K = 98 at block 3": at(3, RandomDrop(Ratio(0.5, of="initial"))),
        "EViT 0.7 at blocks 3, 6, 9": at([3, 6, 9], EViT(Ratio(0.7))),
        "EViT 0.5 at blocks 3, 6, 9": at([3, 6, 9], EViT(Ratio(0.5))),
        "ToMe r = 8, every block": every(1, ToMe(Drop(8)), depth=depth),
        "ToMe r = 13, every block": every(1, ToMe(Drop(13)), depth=depth),
        "ATS K = 160 at block 3": at(3, ATS(Count(160))),
        "ATS K = 96 at block 3": at(3, ATS(Count(96))),
        "ATS K = 48 at block 3": at(3, ATS(Count(48))),
        "ATS K = 196 at blocks 3-11": at(range(3, depth), ATS(Count(196))),
        "ATS K = 108 at blocks 3-11": at(range(3, depth), ATS(Count(108))),
    }


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call, the device's queue drained on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def compare(
    model: nn.Module, placements: dict[str, Placement], images: Tensor, *, rounds: int, warmup: int = 2
) -> list[Timing]:
    """Time every placement on the images against the plain model."""
    device = images.device
    reduced = {name: reduce_tokens(model, placement).eval() for name, placement in placements.items()}
    runs: dict[str, nn.Module] = {"dense": model, **reduced}
    dense_macs = float(reduce_tokens(model, Placement()).trace(images[:1])[1].macs[0])
    macs = {name: float(variant.trace(images)[1].macs.mean()) for name, variant in reduced.items()}
    for _ in range(warmup):
        for run in runs.values():
            run(images)
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            times[name].append(seconds(lambda run=runs[name]: run(images), device))
    table = []
    for name in runs:
        ratios = [dense / own for dense, own in zip(times["dense"], times[name], strict=True)]
        low, speedup, high = _quartiles(ratios)
        own_macs = macs.get(name, dense_macs)
        table.append(
            Timing(
                name, len(images), own_macs / 1e9, dense_macs / own_macs, len(images) / statistics.median(times[name]),
                speedup, low, high, speedup / (dense_macs / own_macs),
            )
        )  # fmt: skip
    return table


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def markdown(table: Sequence[Timing]) -> str:
    """The table as it is printed and kept."""
    lines = [
        "| variant | batch | GMACs | GMACs ratio | images/s | speed-up (quartiles) | efficiency |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in table:
        lines.append(
            f"| {row.variant} | {row.batch} | {row.gmacs:.3f} | {row.gmacs_ratio:.2f} | {row.images_per_second:.1f} "
            f"| {row.speedup:.2f} ({row.speedup_low:.2f}-{row.speedup_high:.2f}) | {row.efficiency:.2f} |"
        )
    return "\n".join(lines) + "\n"


def records(table: Sequence[Timing]) -> list[dict[str, Any]]:
    """The table as plain data."""
    return [asdict(row) for row in table]
