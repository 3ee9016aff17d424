"""Times of variants that took turns in one process.

Absolute times depend on the machine and on what else it does, which may change within seconds; ratios of runs side by
side depend on neither. So each turn of a variant is a pair: it and the dense model, one right after the other, each run
twice of which the second is timed, as if it ran by itself. Which of the two comes first changes from round to round, as
does the order of the variants.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from reducers.errors import ReducerError

NO_TIME = "the time was up"
_LEAST = 2  # rounds, once everything is warm

Run = Callable[[int], Any]  # (number of the round) -> whatever; only its time matters


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of what the rounds gave."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Turns:
    """Seconds of every variant, round by round, those of the first variant right beside it, and why some have none."""

    seconds: dict[str, list[float]]
    beside: dict[str, list[float]]
    errors: dict[str, str]

    def ratio(self, name: str) -> Quartiles:
        """How many times faster than the first variant it is, from ratios taken within each pair."""
        pairs = zip(self.beside[name], self.seconds[name], strict=True)
        return Quartiles.of([other / own for other, own in pairs])

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def wait_for(device: torch.device) -> None:
    """Return when the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call, the device's queue drained on both sides."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def take_turns(
    runs: Mapping[str, Run], device: torch.device, *, rounds: int, warmup: int, seed: int = 0, until: float = math.inf
) -> Turns:
    """Time each variant once a round, beside the first of them, which must not fail.

    Another that fails (out of memory, most often) is left out with its reason, and the others go on. ``until``: when
    ``time.monotonic`` is past it, no further variant is warmed up, and no further round begun behind the second.
    """
    first = next(iter(runs))
    errors = _warm_up(runs, first, device, warmup=warmup, until=until)
    times: dict[str, list[float]] = {name: [] for name in runs if name not in errors}
    beside: dict[str, list[float]] = {name: [] for name in times}
    order, shuffler = [name for name in times if name != first] or [first], random.Random(seed)
    for number in range(rounds):
        if number >= _LEAST and time.monotonic() > until:
            break
        shuffler.shuffle(order)
        for name in order:
            pair = dict.fromkeys([first, name] if shuffler.random() < 0.5 else [name, first])
            timed = {one: _settled(partial(runs[one], number), device) for one in pair}
            times[name].append(timed[name])
            beside[name].append(timed[first])
    if len(times) > 1:
        times[first] = [value for name in order for value in beside[name]]
        beside[first] = times[first]
    return Turns(times, beside, errors)


def _warm_up(runs: Mapping[str, Run], first: str, device: torch.device, *, warmup: int, until: float) -> dict[str, str]:
    """Run each some times; why some are left out."""
    errors: dict[str, str] = {}
    for number in range(max(warmup, 1)):
        for name, run in runs.items():
            if number == 0 and name != first and time.monotonic() > until:
                errors[name] = NO_TIME
            if name in errors:
                continue
            try:
                seconds(partial(run, number), device)
            except (RuntimeError, ReducerError) as error:
                if name == first:
                    raise
                errors[name] = _reason(error)
    return errors


def _settled(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a second call: after the first, caches and memory are this variant's own."""
    seconds(run, device)
    return seconds(run, device)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
