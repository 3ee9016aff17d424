"""Carry out what a run still has to compute, on Ray or in this process, and keep what is finished however it ends."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ablations.measure.chance import warn_at_chance
from ablations.measure.opening import choose_device, known_dense
from ablations.measure.profile import Profile
from ablations.run.contexts import Contexts, make_context, save_context
from ablations.run.jobs import Computation, schedule
from ablations.run.progress import RunProgress
from ablations.run.ray.address import address
from ablations.run.record import keys_in_plan, note_plain_models
from ablations.run.serial import run_serial, run_timed, timed_trials
from ablations.run.session import Session
from ablations.trial.trial import Trial
from ablations.words import duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """How the computing of a run ended."""

    interrupted: bool
    workers: int  # that computed side by side
    failures: Sequence[tuple[str, str]]  # (trial in words, reason)
    missing: int  # trials that ended without a result or a reason
    finished: int  # of the trials asked for, those with a result by now


def execute(
    session: Session,
    work: Sequence[Computation],
    profile: Profile,
    *,
    serial: bool,
    workers: int | None = None,
    time_limit: float | None = None,
) -> Ended:
    """Evaluate, then time what is to be timed; whatever happens, what is finished is kept and compacted.

    ``time_limit``: seconds without progress after which a trial is ended, where it runs on Ray; None is without end.

    Raises:
        StoreError: results can no longer be written.
    """
    timed = timed_trials(work)
    left = _not_evaluated(session, work, timed)
    progress = RunProgress(left, timed=timed, store=session.store)
    interrupted = False
    try:
        with progress:
            _compute(session, left, timed, profile, progress, serial=serial, workers=workers, time_limit=time_limit)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the summary short
        interrupted = True
    except OSError:  # no space, most likely: what is there can still be read, and perhaps be compacted
        with suppress(OSError):
            compact(session)
        raise
    kept = compact(session)
    if not interrupted:
        log.info("%d trials in %s", progress.finished, duration(progress.elapsed))
    missing = progress.total - progress.finished
    return Ended(interrupted, progress.at_once, progress.failures, missing, kept)


def compact(session: Session) -> int:
    """Collect the planned trials on disk; how many of this run's are finished."""
    keys = [key for keys in keys_in_plan(session.store).values() for key in keys]
    session.store.compact(keys)
    return len(session.store.finished() & {trial.key for trial in session.all_trials})


def _compute(
    session: Session,
    left: Sequence[Computation],
    timed: Sequence[Trial],
    profile: Profile,
    progress: RunProgress,
    *,
    serial: bool,
    workers: int | None,
    time_limit: float | None,
) -> None:
    contexts = Contexts(lambda model: make_context(session, choose_device(), model=model, profile=profile))
    models = list(dict.fromkeys(trial.model for trial in (*(one.trial for one in left), *timed)))
    if serial or not address():  # on a cluster, a worker finds the plain predictions
        for model in models:
            contexts[model]  # they come first
        note_plain_models(session)
    if serial:
        run_serial(schedule(left, workers=1), contexts=contexts, store=session.store, progress=progress)
    elif left or timed:
        with profile.measure("imports"):
            from ablations.run.ray.driver import run_on_ray

        run_on_ray(
            left,
            timed=timed,
            contexts={model: save_context(session, model) for model in models},
            facts=session.all_facts,
            store=session.store,
            progress=progress,
            profile=profile,
            workers=workers,
            time_limit=time_limit,
            asked=lambda: _say_plain(session),
        )
    run_timed(timed, contexts=contexts, store=session.store, progress=progress)


def _say_plain(session: Session) -> None:
    """What a cluster's workers found the plain models to say."""
    for subject in session.subjects.values():
        dense = known_dense(subject, session.store.cache)
        if dense is not None and address():  # else it was said here
            warn_at_chance(subject.facts.name, subject.facts.weights, dense, subject.workload)
    note_plain_models(session)


def _not_evaluated(session: Session, work: Sequence[Computation], timed: Sequence[Trial]) -> list[Computation]:
    """What is left to evaluate: the results of some trials may only wait to be timed."""
    waiting = session.store.untimed.finished(verify=True) if timed else set()
    return [one for one in work if not all(trial.measure and trial.key in waiting for trial in one.answers)]
