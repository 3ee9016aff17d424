"""The time left, to the digit: work that workers divide, timings that nobody shares."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ablations.measure import speed
from ablations.run.jobs import Computation, computations
from ablations.run.pace import TIMING
from ablations.run.progress import RunProgress
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.trial.target import Target
from ablations.trial.trial import Trial

PLAIN = "{name: s, title: S, arms: [{variant: v, vary: {K: [9, 19, 29, 39]}, x: K, stages: [{at: 3, stack: [%s]}]}]}"
TIMED = (
    "{name: t, title: T, base: {measure: speed, batch: [1, 2, 4], x: batch}, "
    "arms: [{variant: v, stages: [{at: 3, stack: [%s]}]}]}"
)
TOPK = "{name: topk, budget: {count: %s}}"


@pytest.fixture
def work(target: Target) -> list[Computation]:
    """Four computations of one trial each, each at a cost of its own: 1, 2, 3 and 4."""
    trials = expand(parse_spec(PLAIN % TOPK % "$K"), target)
    found = computations(trials, {target.facts.name: target.facts}, batches={target.facts.name: target.batch})
    return [dataclasses.replace(one, cost=float(cost)) for cost, one in enumerate(found, 1)]


@pytest.fixture
def timed(target: Target) -> list[Trial]:
    return expand(parse_spec(TIMED % TOPK % 20), target)


def evaluated(timed: list[Trial], target: Target) -> Computation:
    """The one evaluation that all the timed trials ask for: 5 where the plain model costs 10."""
    (one,) = computations(timed, {target.facts.name: target.facts}, batches={target.facts.name: target.batch})
    assert len(one.answers) == 3 and one.dense > 0
    return dataclasses.replace(one, cost=5.0, dense=10.0)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_work_that_is_left_is_divided_by_the_workers(workers: int, work: list[Computation]) -> None:
    progress = RunProgress(work, terminal=False)
    progress.at_once = workers
    assert progress.seconds_left() is None, "nothing is known yet"
    progress.done(work[0], seconds=6.0)
    assert progress.seconds_left() == pytest.approx(6.0 * (2 + 3 + 4) / workers)
    progress.done(work[3], seconds=14.0)
    assert progress.seconds_left() == pytest.approx(20.0 / 5 * (2 + 3) / workers), "20 seconds for a cost of 5"
    progress.done(work[1], error="ValueError: no")
    assert progress.seconds_left() == pytest.approx(20.0 / 5 * 3 / workers), "a failure tells nothing of the pace"


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_timings_count_from_the_start_and_are_divided_by_nobody(
    workers: int, work: list[Computation], timed: list[Trial], target: Target
) -> None:
    alone = evaluated(timed, target)
    progress = RunProgress([*work, alone], timed=timed, terminal=False)
    progress.at_once = workers
    progress.done(work[0], seconds=60.0)  # 60 seconds for a cost of 1 and all of the images, on one of the workers
    batches = [60.0 / target.images * trial.batch / workers for trial in timed]
    timings = sum(speed.expected_seconds(reduced=5 * one, dense=10 * one) for one in batches)
    assert progress.seconds_left() == pytest.approx(60.0 * (2 + 3 + 4 + 5) / workers + timings)
    for one in (*work[1:], alone):
        progress.done(one, seconds=60.0 * one.cost)
    assert progress.seconds_left() == pytest.approx(timings), "no jump when nothing but timings remains"
    assert timings > 9 * 15 * sum(batches), "at least nine rounds of both models"


def test_what_timings_took_corrects_what_the_others_are_expected_to_take(
    work: list[Computation], timed: list[Trial], target: Target
) -> None:
    alone = evaluated(timed, target)
    progress = RunProgress([alone], timed=timed, terminal=False)
    progress.done(alone, seconds=500.0)
    first, *others = [
        speed.expected_seconds(reduced=500 / target.images * trial.batch, dense=1000 / target.images * trial.batch)
        for trial in timed
    ]
    progress.timed(timed[0], seconds=first / 4)
    assert progress.seconds_left() == pytest.approx(sum(others) / 4)
    progress.timed(timed[1], error="RuntimeError: the clock is broken")
    assert progress.seconds_left() == pytest.approx(others[1] / 4)
    progress.timed(timed[2], seconds=1.0)
    assert progress.seconds_left() == 0 and progress.finished == progress.total == 3


def test_timings_alone_take_the_mean_of_those_that_are_done(timed: list[Trial]) -> None:
    progress = RunProgress([], timed=timed, terminal=False)
    assert progress.seconds_left() == 3 * TIMING, "an earlier run has evaluated them"
    progress.timed(timed[0], seconds=30.0)
    assert progress.seconds_left() == pytest.approx(60.0)
    progress.timed(timed[1], seconds=10.0)
    assert progress.seconds_left() == pytest.approx(20.0)


def test_a_failed_evaluation_takes_its_timings_with_it(timed: list[Trial], target: Target) -> None:
    alone = evaluated(timed, target)
    progress = RunProgress([alone], timed=timed, terminal=False)
    progress.done(alone, error="ValueError: no")
    assert progress.seconds_left() == 0 and progress.finished == 3 and len(progress.failures) == 3


@pytest.mark.parametrize(("reduced", "dense"), [(0.001, 0.002), (0.04, 0.07), (0.3, 0.5), (5.0, 9.0)])
def test_a_timing_is_expected_to_take_what_it_takes(
    reduced: float, dense: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> Callable[[Any], None]:
        return lambda images: now.__setitem__(0, now[0] + seconds)

    speed.in_turn(takes(dense), takes(reduced), [torch.zeros(1)] * 4, device=torch.device("cpu"))  # type: ignore[arg-type]
    # warm-up takes two batches of each model
    assert speed.expected_seconds(reduced=reduced, dense=dense) == pytest.approx(now[0], rel=0.02)
