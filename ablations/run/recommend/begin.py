"""From the wishes of a person to the files of a recommendation: everything opened, searched, confirmed and written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.measure.opening import Subject, choose_device, open_context, open_subject
from ablations.measure.profile import Profile
from ablations.records.names import CANDIDATES
from ablations.run.given import Given, keep_given, read_given
from ablations.run.recommend import outcome
from ablations.run.recommend.call import Call, Found, Goal, Searcher, Wishes
from ablations.run.recommend.progress import SearchProgress
from ablations.run.recommend.record import write_record
from ablations.run.recommend.serial import search_serially
from ablations.run.recommend.speeds import meet_speed, shares_at_speed
from ablations.run.session import Settings
from ablations.search.errors import SearchError
from ablations.search.parts import part
from ablations.search.space import describe
from ablations.store.store import Store
from ablations.tasks import task_of
from ablations.trial.given import short_name
from ablations.trial.stages import HostOptions, Training
from ablations.trial.trial import ModelFacts

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
    command: Sequence[str], trained: Sequence[Path] = (), host: Mapping[str, str] | None = None,
) -> Ended:  # fmt: skip
    """Carry a call out, or on from where it was stopped. ``trained``: folders of trainings whose weights are given;
    ``host``: how the model is driven (``reduce_tokens``).

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
    if trained and not task_of(settings.task).needs_labels:
        raise SearchError(
            f"--trained: the task {settings.task} asks how near answers stay to the model's own, and trained weights "
            "are another model's: leave it out, or search with --task classify"
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
        driven = host_options(host or {}, subject.facts)
        given = [read_given(folder, subject) for folder in trained]
    with ExitStack() as stack:
        stack.enter_context(store.lock())
        weights_given = tuple(sorted({_kept(one, store) for one in given}, key=short_name))  # in whatever order
        given.clear()  # their tensors are kept there by now
        context = open_context(subject, choose_device(), cache=out.cache, profile=profile)
        log.info(
            "%d images: %d to search on, %d to confirm on, %d to calibrate on",
            len(subject.workload), len(parts.search), len(parts.confirmation), len(subject.calibration or ()),
        )  # fmt: skip
        searcher, at_once = stack.enter_context(
            _searcher(subject, out, store, seed=seed, host=driven, serial=serial, workers=workers, profile=profile)
        )
        call = Call(
            subject, context, parts, store,
            wishes=Wishes(tuple(goals), candidates=candidates, seed=seed, given=weights_given, host=driven),
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
    subject: Subject, out: Store, store: Store, *, seed: int, host: HostOptions, serial: bool, workers: int | None,
    profile: Profile,
) -> Iterator[tuple[Searcher, int]]:  # fmt: skip
    """Who carries races out, and how many candidates at once."""
    if serial:
        yield search_serially, 1
        return
    with profile.measure("imports"):
        from ablations.run.ray.search import search_on_ray
    with search_on_ray(
        subject, out, store, seed=seed, host=host, workers=workers, profile=profile, time_limit=_PATIENCE
    ) as searching:
        yield searching


def _kept(given: Given, store: Store) -> Training:
    """The weights of a training, kept beside the results: from here on they are told by their content."""
    keep_given(given, store)
    stages = given.training.stages.data
    log.info("trained %s: %s, from %s", short_name(given.training), describe(stages), given.folder)
    return given.training


def host_options(chosen: Mapping[str, str], facts: ModelFacts) -> HostOptions:
    """How the model is driven, the default left out.

    Raises:
        SearchError: the model's host knows no such option, or no such value of it.
    """
    known = ", ".join(f"{name}={'|'.join(values)}" for name, values in facts.options.items())
    for name, value in chosen.items():
        if value not in facts.options.get(name, ()):
            raise SearchError(f"--host {name}={value}: {facts.name} knows {known or 'no options: leave it out'}")
    return HostOptions.of({name: value for name, value in chosen.items() if value != facts.options[name][0]})


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
