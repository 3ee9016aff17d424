"""From trials to jobs: nothing twice, nothing lost, groups that may share, and no idle worker at the end."""

from __future__ import annotations

import dataclasses

import pytest

from ablations.run.jobs import LARGEST, Computation, Job, computations, expected_end, schedule
from ablations.spec.expand import expand
from ablations.spec.model import find_specs, parse_spec
from ablations.trial.stages import Training
from ablations.trial.target import Target
from ablations.trial.trial import ModelFacts, Trial
from reducers import TopK, registry
from tests.ablations.runs import SPEC

AT = "{name: s, title: S, arms: [{variant: v, vary: {b: %s}, x: b, stages: [{at: [$b], stack: [%s]}]}]}"


@pytest.fixture
def trial(target: Target) -> Trial:
    return expand(parse_spec(SPEC), target)[0]


def work_at(target: Target, blocks: list[int], reducer: str = "{name: topk, budget: {count: 20}}") -> list[Computation]:
    trials = expand(parse_spec(AT % (blocks, reducer)), target)
    return computations(trials, {target.facts.name: target.facts}, batches={target.facts.name: target.batch})


def test_every_trial_is_answered_once(target: Target) -> None:
    files = find_specs()
    by_key = {trial.key: trial for file in files for trial in expand(file, target)}
    work = computations(by_key.values(), {target.facts.name: target.facts}, batches={target.facts.name: 4})
    assert len(work) < len(by_key), "specs ask some questions twice"
    for workers in (1, 2, 7):
        jobs = schedule(work, workers=workers)
        assert sorted(trial.key for job in jobs for trial in job.trials) == sorted(by_key)
        assert [job.cost for job in jobs] == sorted((job.cost for job in jobs), reverse=True)
        for job in jobs:
            kinds = {(one.trial.model, one.trial.training, one.trial.batch) for one in job.computations}
            assert len(kinds) == 1
            assert len(job.computations) <= LARGEST or job.computations[0].trial.training


def test_groups_are_of_trials_that_begin_to_reduce_nearby(target: Target) -> None:
    jobs = schedule(work_at(target, [10, 2, 9, 3, 2, 11, 10, 3, 9, 4, 4, 11]), workers=1)
    begin = [[one.trial.stages.data[0]["at"][0] for one in job.computations] for job in jobs]
    assert sorted(begin) == [[9, 10, 11], [2, 3, 4]] or sorted(map(sorted, begin)) == [[2, 3, 4, 9, 10, 11]]


def test_a_group_costs_its_common_part_once(target: Target) -> None:
    work = work_at(target, [6, 7, 8])
    alone = [Job((one,)).cost for one in work]
    assert alone == [one.cost for one in work]
    assert Job(tuple(work)).cost == pytest.approx(sum(alone) - sum(one.prefix for one in work) + work[2].prefix)
    assert work[0].prefix == pytest.approx(work[2].prefix * 6 / 8)


def test_reducers_that_look_at_the_images_first_share_nothing(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(TopK):
        def plan(self, images: object, host: object) -> None:
            """Looks at the images before any block."""

    monkeypatch.setitem(registry._METHODS, "topk", Looking)
    assert [one.prefix for one in work_at(target, [6])] == [0]


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 12, 37, 150])
def test_no_worker_idles_while_trials_remain(workers: int, count: int, target: Target) -> None:
    """The plan ends at most one short trial after the perfect one, of the costs as the groups have them."""
    some = work_at(target, [3, 5, 7, 9])
    work = [some[index % 4] for index in range(count)]
    jobs = schedule(work, workers=workers)
    ideal = max(sum(job.cost for job in jobs) / workers, max(one.cost for one in work))
    end = max(finished(jobs, workers))
    assert end <= ideal + max(one.cost for one in work)
    assert end <= expected_end(jobs, workers=workers)
    alone = [Job((one,)) for one in work]
    assert expected_end(jobs, workers=workers) <= expected_end(alone, workers=workers) * (1 + 1e-9)


def finished(jobs: list[Job], workers: int) -> list[float]:
    """When each worker ends, if each takes the next job as soon as it can."""
    ends = [0.0] * workers
    for job in jobs:
        first = ends.index(min(ends))
        ends[first] += job.cost
    return ends


def test_trials_with_one_training_stay_together(trial: Trial, facts: ModelFacts) -> None:
    training = Training.of({"epochs": 5, "images": 1000})
    other = Training.of({"epochs": 50, "images": 1000})
    trials = [dataclasses.replace(trial, seed=seed, training=training) for seed in range(9)]
    trials += [dataclasses.replace(trial, seed=seed, training=other) for seed in range(2)]
    trials += [dataclasses.replace(trial, seed=seed) for seed in range(9)]
    jobs = schedule(computations(trials, {facts.name: facts}, batches={facts.name: 4}), workers=2)
    assert [len(job.computations) for job in jobs if job.computations[0].trial.training] == [2, 9]
    assert jobs[0].computations[0].trial.training == other, "the long training comes first"
    assert jobs[0].cost < 2 * jobs[0].computations[0].training_cost, "and is counted once"
    assert jobs[1].computations[0].trial.training.data["epochs"] == 5


def test_a_timed_trial_is_evaluated_like_any_other(trial: Trial, facts: ModelFacts) -> None:
    timed = dataclasses.replace(trial, spec="runtime", measure="speed", batch=1)
    (one,) = computations([timed, trial], {facts.name: facts}, batches={facts.name: trial.batch})
    assert one.answers == (timed, trial) and one.trial.batch == trial.batch and one.trial.measure == ""
    other = dataclasses.replace(timed, batch=8)
    (one,) = computations([timed, other], {facts.name: facts}, batches={facts.name: trial.batch})
    assert one.answers == (timed, other)


def test_nothing_to_do_is_no_job() -> None:
    assert schedule([], workers=2) == []
