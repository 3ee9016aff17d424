"""Run jobs one after the other in this process: no Ray, and every error where a debugger can see it.

What one process can do is done here for the workers of Ray as well: a job from its trials to stored results, and the
trials that are timed, which always have their device to themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablations.measure.context import TrialContext
from ablations.measure.evaluate import Report, run_group
from ablations.measure.speed import measure_speed
from ablations.run.contexts import Contexts
from ablations.run.jobs import Computation, Job
from ablations.run.progress import RunProgress
from ablations.trial.stages import Stages
from ablations.trial.trial import Trial, TrialResult, answers, failed

if TYPE_CHECKING:
    from ablations.store.store import Store  # which needs pyarrow, and other places for results do not

log = logging.getLogger(__name__)

_PAUSES = (0.5, 4.0)  # seconds before a write that failed is tried again: disks and object stores have their moments


@dataclass(frozen=True)
class Outcome:
    """How a computation ended."""

    seconds: float
    error: str | None


def carry_out(job: Job, context: TrialContext, store: Store, *, report: Report | None = None) -> list[Outcome]:
    """Evaluate the trials of a job together and store every result, or time them; one outcome a computation.

    Raises:
        StoreError: a result cannot be written, now or some seconds later. What was written stays.
    """
    with store.log([trial.key for trial in job.trials]):
        if job.timed:
            return [time_trial(trial, context, store) for trial in job.trials]
        results = run_group([computation.trial for computation in job.computations], context, report=report)
        with context.profile.measure("writing"):
            for computation, result in zip(job.computations, results, strict=True):
                for trial, answer in zip(
                    computation.answers, answers(result, computation.answers, context.facts), strict=True
                ):
                    keep(answer, trial, store)
    return [Outcome(result.row["seconds"], result.row["error"]) for result in results]


def keep(result: TrialResult, trial: Trial, store: Store) -> None:
    """Store a result. What cannot be written is tried again a moment later, then raised as it came."""
    _insist(lambda: store.keep(result, trial), trial)


def _insist(write: Callable[[], None], trial: Trial) -> None:
    for pause in _PAUSES:
        try:
            return write()
        except OSError as error:
            log.warning("the result of trial %s cannot be written (%s); trying again in %g s", trial.key, error, pause)
            time.sleep(pause)
    return write()


def run_serial(jobs: Sequence[Job], *, contexts: Contexts, store: Store, progress: RunProgress) -> None:
    """Each job's results are on disk before the next job starts."""
    for job in jobs:
        report = epochs_to(progress, job)
        progress.began(job.trials)
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
        if not waits_to_be_timed(trial, store):
            continue  # its evaluation failed, and that is on record; or it has been timed
        progress.began([trial])
        outcome = time_trial(trial, contexts[trial.model], store)
        progress.timed(trial, seconds=outcome.seconds, error=outcome.error)


def waits_to_be_timed(trial: Trial, store: Store) -> bool:
    """It is evaluated, and nothing but its times is missing."""
    row = store.untimed.load(trial.key)
    return row is not None and row["status"] == "ok"


def time_trial(trial: Trial, context: TrialContext, store: Store) -> Outcome:
    """Time a trial whose evaluation waits in the store, and store both; whatever goes wrong is its record."""
    row, started = store.untimed.load(trial.key), time.perf_counter()
    if row is None:
        return Outcome(0.0, "its evaluation is no longer there; run the same command again")
    context.beat()
    try:
        with context.profile.measure("speed"):
            columns = measure_speed(trial, context, stages=Stages(row["reducer"]))
    except Exception as error:  # noqa: BLE001  # a trial that cannot be timed is a record like any other failure
        seconds = time.perf_counter() - started
        lost = failed(trial, context.facts, error, seconds=seconds)
        keep(lost, trial, store)
        return Outcome(seconds, lost.row["error"])
    seconds = time.perf_counter() - started
    _insist(lambda: store.release(trial.key, {**columns, "seconds": row["seconds"] + seconds}), trial)
    return Outcome(seconds, None)


def timed_trials(work: Sequence[Computation]) -> list[Trial]:
    """The trials among the answers that are to be timed."""
    return [trial for computation in work for trial in computation.answers if trial.measure]
