"""From trials to work: what is computed once, what is computed together, and in which order.

A computation answers every trial that asks the same under different names. Computations that leave the first blocks of
one model alone share what it computes there, so they are grouped; but a long group at the end leaves cores idle. So the
ways to cut the groups are simulated on the number of workers at hand, and the one that ends first is taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ablations.trial.labels import blocks_of
from ablations.trial.trial import ModelFacts, Trial, estimated_cost, trained_together
from reducers import available
from reducers.reducer import Plans, Prepares, Selects

LARGEST = 6  # computations in a group: the gain of each further one is small, and so is what an interruption loses
SPEED = "speed"
_CALIBRATION = 0.8  # cost of finding a free setting, in evaluations of the dense model on as many images
_BACKWARD = 3.0  # a training step costs that many forward passes
_TRAINING_IMAGES = 5000  # where a recipe leaves it to the data
_RISK = 0.25  # how wrong the estimate of a single job may be


@dataclass(frozen=True)
class Computation:
    """One evaluation, and every trial that it answers: specs may ask the same question under different names."""

    trial: Trial  # what is evaluated
    answers: tuple[Trial, ...]
    cost: float  # rough multiply-adds per image
    prefix: float  # the part of it that the plain model computes alike; 0 if it shares nothing
    training_cost: float = 0.0  # of the weights it is evaluated with; paid once by all that share them
    dense: float = 0.0  # what the plain model costs, which a timing runs as often; 0 where that is not known

    @property
    def total(self) -> float:
        """The cost if it is computed alone."""
        return self.cost + self.training_cost


@dataclass(frozen=True)
class Job:
    """Computations that one worker carries out together: one model, one training.

    ``timed``: they are evaluated already, and what is left is to time their answers, with the device to themselves.
    """

    computations: tuple[Computation, ...]
    timed: bool = False

    @property
    def model(self) -> str:
        return self.computations[0].trial.model

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial that the job answers."""
        return tuple(trial for computation in self.computations for trial in computation.answers)

    @property
    def whole_device(self) -> bool:
        """It wants a GPU to itself: a training fills one, and a timing must not share."""
        return self.timed or bool(self.computations[0].trial.training)

    @property
    def cost(self) -> float:
        """What all of them cost together, the common part and the training once."""
        own = sum(computation.cost - computation.prefix for computation in self.computations)
        common = max(computation.prefix for computation in self.computations)
        return own + common + max(computation.training_cost for computation in self.computations)


def computations(
    trials: Iterable[Trial], facts: Mapping[str, ModelFacts], *, batches: Mapping[str, int]
) -> list[Computation]:
    """What has to be evaluated to answer these trials, in their order; ``facts`` and ``batches`` are by model.

    A trial that is timed is evaluated like any other, in batches of the run's size: its own is what is timed.
    """
    groups: dict[str, tuple[Trial, list[Trial]]] = {}
    for trial in trials:
        evaluated = trial
        if trial.measure == SPEED:
            evaluated = trial.evaluated(batches[trial.model])
        groups.setdefault(evaluated.computation, (evaluated, []))[1].append(trial)
    return [_computation(trial, tuple(answers), facts[trial.model]) for trial, answers in groups.values()]


def schedule(work: Sequence[Computation], *, workers: int) -> list[Job]:
    """The jobs, the longest first, cut so that all of ``workers`` end at about the same time."""
    if not work:
        return []
    best: tuple[float, list[Job]] | None = None
    for largest in range(LARGEST, 0, -1):
        for alone in sorted({min(len(work), workers * turns) for turns in (0, 1, 2, 3, 4, 6)}):
            jobs = _cut(work, largest=largest, alone=alone if workers > 1 else 0)
            ends = expected_end(jobs, workers=workers)
            if best is None or ends < best[0] * (1 - 1e-9):
                best = ends, jobs
    assert best is not None
    return best[1]


def timings(trials: Iterable[Trial]) -> list[Job]:
    """A job for each trial that is evaluated and still to be timed."""
    return [Job((Computation(trial, (trial,), 0.0, 0.0),), timed=True) for trial in trials]


def expected_end(jobs: Sequence[Job], *, workers: int) -> float:
    """When the last worker is done if each takes the next job as soon as it is free, in units of cost.

    A part of the longest job that ends a worker's day is added: estimates are rough, and a long last job is a risk.
    """
    free = [(0.0, 0.0)] * workers  # (when it is free, cost of its last job)
    for job in jobs:
        at, _ = heapq.heappop(free)
        heapq.heappush(free, (at + job.cost, job.cost))
    risk = _RISK * max(last for _, last in free) if workers > 1 else 0.0
    return max(at for at, _ in free) + risk


def _cut(work: Sequence[Computation], *, largest: int, alone: int) -> list[Job]:
    """Groups of at most ``largest`` that share a model; the ``alone`` cheapest go one by one, to fill gaps at the end.

    Trials with one training stay together whatever their number, so that one worker trains and the others need not
    wait.
    """
    order = sorted(work, key=lambda computation: computation.total)
    single = {id(computation) for computation in [c for c in order if not c.trial.training][:alone]}
    buckets: dict[tuple[object, ...], list[Computation]] = {}
    jobs = []
    for computation in work:
        trial = computation.trial
        if id(computation) in single:
            jobs.append(Job((computation,)))
        else:
            buckets.setdefault(trained_together(trial), []).append(computation)
    for members in buckets.values():
        members.sort(key=lambda computation: (-computation.prefix, -computation.cost))
        size = len(members) if members[0].trial.training else largest
        jobs += [Job(tuple(members[start : start + size])) for start in range(0, len(members), size)]
    return sorted(jobs, key=lambda job: -job.cost)


def _computation(trial: Trial, answers: tuple[Trial, ...], facts: ModelFacts) -> Computation:
    stages, dense = trial.stages.data, estimated_cost((), facts)
    blocks = blocks_of(stages)
    methods = [available()[reducer["name"]] for stage in stages for reducer in stage["stack"]]
    shares = not any(issubclass(method, (Prepares, Selects, Plans)) for method in methods)
    cost = estimated_cost(stages, facts, trial.target)
    prefix = min(cost, dense * (blocks[0] if blocks else facts.depth) / facts.depth) if shares else 0.0
    if trial.target is not None:
        cost += _CALIBRATION * dense
    return Computation(trial, answers, cost, prefix, _training_cost(trial, dense), dense)


def _training_cost(trial: Trial, dense: float) -> float:
    """Rough multiply-adds of the training, for each evaluated image."""
    if not trial.training:
        return 0.0
    recipe = trial.training.data
    epochs, images = recipe.get("epochs"), recipe.get("images")
    steps = (epochs if isinstance(epochs, int) else 5) * (images if isinstance(images, int) else _TRAINING_IMAGES)
    return _BACKWARD * dense * steps / max(1, trial.images)
