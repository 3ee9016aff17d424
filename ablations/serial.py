"""Run jobs one after the other in this process: no Ray, and every error where a debugger can see it.

What one process can do is done here for the workers of Ray as well: a job from its trials to stored results, and the
trials that are timed, which always have the machine to themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ablations.context import Contexts
from ablations.evaluate import Report, run_group
from ablations.inputs import TrialContext
from ablations.jobs import Computation, Job
from ablations.progress import RunProgress
from ablations.speed import measure_speed
from ablations.store import Store
from ablations.trial import Trial, answers, failed


@dataclass(frozen=True)
class Outcome:
    """How a computation ended."""

    seconds: float
    error: str | None


def carry_out(job: Job, context: TrialContext, store: Store, *, report: Report | None = None) -> list[Outcome]:
    """Evaluate the trials of a job together and store every result; one outcome a computation."""
    results = run_group([computation.trial for computation in job.computations], context, report=report)
    with context.profile.measure("writing"):
        for computation, result in zip(job.computations, results, strict=True):
            for trial, answer in zip(
                computation.answers, answers(result, computation.answers, context.facts), strict=True
            ):
                store.keep(answer, trial)
    return [Outcome(result.row["seconds"], result.row["error"]) for result in results]


def run_serial(jobs: Sequence[Job], *, contexts: Contexts, store: Store, progress: RunProgress) -> None:
    """Each job's results are on disk before the next job starts."""
    for job in jobs:
        report = epochs_to(progress, job)
        for computation, outcome in zip(
            job.computations, carry_out(job, contexts[job.model], store, report=report), strict=True
        ):
            progress.done(computation, seconds=outcome.seconds, error=outcome.error)


def epochs_to(progress: RunProgress, job: Job) -> Callable[[dict[str, Any]], None]:
    """Where a job's finetuning tells of its epochs."""
    return lambda epoch: progress.trained(job.trials, epoch)


def run_timed(trials: Sequence[Trial], *, contexts: Contexts, store: Store, progress: RunProgress) -> None:
    """Time trials whose evaluation waits in the store, one by one with nothing beside them."""
    for trial in trials:
        row = store.untimed.load(trial.key)
        if row is None or row["status"] != "ok":
            continue  # its evaluation failed, and that is on record
        context, started = contexts[trial.model], time.perf_counter()
        try:
            with context.profile.measure("speed"):
                columns = measure_speed(trial, context, stages=row["reducer"])
        except Exception as error:  # noqa: BLE001  # a trial that cannot be timed is a record like any other failure
            seconds = time.perf_counter() - started
            lost = failed(trial, context.facts, error, seconds=seconds)
            store.save(lost)
            progress.timed(trial, seconds=seconds, error=lost.row["error"])
            continue
        seconds = time.perf_counter() - started
        store.release(trial.key, {**columns, "seconds": row["seconds"] + seconds})
        progress.timed(trial, seconds=seconds)


def timed_trials(work: Sequence[Computation]) -> list[Trial]:
    """The trials among the answers that are to be timed."""
    return [trial for computation in work for trial in computation.answers if trial.measure]
