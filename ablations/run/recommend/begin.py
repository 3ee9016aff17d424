"""From the wishes of a person to the files of a recommendation: everything opened, searched, confirmed and written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ablations.measure.opening import Subject, choose_device, open_context, open_subject
from ablations.measure.profile import Profile
from ablations.records.names import CANDIDATES
from ablations.run.recommend import outcome
from ablations.run.recommend.call import Call, Found, Goal, Searcher, Wishes
from ablations.run.recommend.progress import SearchProgress
from ablations.run.recommend.record import write_record
from ablations.run.recommend.serial import search_serially
from ablations.run.recommend.speeds import meet_speed, shares_at_speed
from ablations.run.session import Settings
from ablations.search.errors import SearchError
from ablations.search.parts import part
from ablations.store.store import Store
from ablations.tasks import task_of

log = logging.getLogger(__name__)

_PATIENCE = 3600.0  # seconds without progress after which a worker is ended


@dataclass(frozen=True)
class Ended:
    """What came of a call."""

    told: list[dict[str, Any]]  # a goal each
    files: list[str]  # its placement file
    profile: Profile
    workers: int


def begin(
    settings: Settings, goals: Sequence[Goal], *, candidates: int, seed: int, serial: bool, workers: int | None,
    command: Sequence[str],
) -> Ended:  # fmt: skip
    """Carry a call out, or on from where it was stopped.

    Raises:
        SearchError: it cannot be answered; the message names the remedy.
    """
    if settings.model and len(settings.chosen()) > 1:
        raise SearchError(
            f"MODEL={settings.model}: one model is searched for at a time; give one, each an OUT of its own"
        )
    if task_of(settings.task).dimensions != 1:
        raise SearchError(
            f"a search goes by the mean over images of a quantity, and that of the task {settings.task} is no mean: "
            "search with --task classify or embed (TASK=…), and run what is found with this task"
        )
    out = Store(settings.out).create()
    store = Store(out.storage.below(CANDIDATES)).create()
    profile = Profile()
    with profile.measure("opening"):
        ((name, weights),) = settings.chosen()[:1]
        subject = open_subject(
            settings.source, name, weights=weights, cache=out.cache, batch=settings.batch, task=settings.task
        )
        parts = part(subject.workload, subject.calibration)
    with ExitStack() as stack:
        stack.enter_context(store.lock())
        context = open_context(subject, choose_device(), cache=out.cache, profile=profile)
        log.info(
            "%d images: %d to search on, %d to confirm on, %d to calibrate on",
            len(subject.workload), len(parts.search), len(parts.confirmation), len(subject.calibration or ()),
        )  # fmt: skip
        searcher, at_once = stack.enter_context(
            _searcher(subject, out, store, seed=seed, serial=serial, workers=workers, profile=profile)
        )
        call = Call(
            subject, context, parts, store,
            wishes=Wishes(tuple(goals), candidates=candidates, seed=seed),
            searcher=searcher, told=SearchProgress(candidates).told, warm=_earlier(out),
        )  # fmt: skip
        try:
            found = [_search(call, goal) for goal in goals]
            seen = call.confirm(found)
        finally:
            write_record(store, call, settings, command=command)
        tests = sum(len(one.finalists) for one in found)
        told = [outcome.outcome(call, one, seen=seen, tests=tests) for one in found]
        names = outcome.write(out, call, told, found)
        write_record(store, call, settings, command=command)
    return Ended(told, [out.storage.below(name) for name in names], profile, at_once)


@contextmanager
def _searcher(
    subject: Subject, out: Store, store: Store, *, seed: int, serial: bool, workers: int | None, profile: Profile
) -> Iterator[tuple[Searcher, int]]:  # fmt: skip
    """Who carries races out, and how many candidates at once."""
    if serial:
        yield search_serially, 1
        return
    with profile.measure("imports"):
        from ablations.run.ray.search import search_on_ray
    with search_on_ray(
        subject, out, store, seed=seed, workers=workers, profile=profile, time_limit=_PATIENCE
    ) as searching:
        yield searching


def _earlier(out: Store) -> Store | None:
    """What an earlier run left in OUT, if anything."""
    return out if out.finished() else None


def _search(call: Call, goal: Goal) -> Found:
    """The finalists of a goal."""
    if goal.share is not None:
        share = goal.share
        return call.search(goal, share, lambda stages: share)
    found = call.search(goal, *shares_at_speed(call, goal))
    meet_speed(call, found)
    return found
