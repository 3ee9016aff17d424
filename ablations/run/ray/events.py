"""What happens in a run on Ray, as Tune tells it: who began, who ended, who was lost, and why."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from ablations.measure.profile import Profile
from ablations.records.storage import StoreError
from ablations.run.jobs import Job
from ablations.run.progress import RunProgress

_NODE = ("node has died", "node was terminated", "node is dead", "preempt")  # what Ray says of an actor whose node went
_MEMORY = ("running low on memory", "OutOfMemoryError")  # … of one that its memory monitor ended


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a person sees of a run."""

    progress: RunProgress
    profile: Profile


@dataclasses.dataclass(frozen=True)
class Lost:
    """A job whose worker ended without a result."""

    job: Job
    reason: str
    with_node: bool  # the machine went, so the job need not be to blame


class Events(tune.Callback):
    """Carries what happens in Tune to the progress display, keeps the clocks,
    and tells ``on_lost`` of each job whose worker was lost.

    ``stall`` says of a job, by its number, where its worker stood if it hung; on a ``joined`` cluster Ray may notice
    that a worker is gone before it notices that the whole node is.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        shown: Shown,
        *,
        on_lost: Callable[[Lost], None],
        stall: Callable[[int], str | None],
        limit: float | None,
        joined: bool = False,
    ) -> None:
        self._jobs, self._shown, self._on_lost = jobs, shown, on_lost
        self._stall, self._limit, self._joined = stall, limit, joined
        self._results: dict[int, dict[str, Any]] = {}
        self._began: dict[int, float] = {}  # of jobs that run
        self._started: set[int] = set()
        self._since = time.perf_counter()
        self._fatal: str | None = None
        self.places: list[dict[str, Any]] = []  # where each job ran

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes callbacks down to restore a run, and a progress bar cannot be written."""
        return {}

    # --- called by Tune -----------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        index = trial.config["job"]
        self.tick()
        self._started.add(index)
        self._began[index] = self._since
        self._shown.progress.began(self._jobs[index].trials)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "epoch" in result:
            self._shown.progress.trained(self._jobs[trial.config["job"]].trials, result["epoch"])
        elif "fatal" in result:
            self._fatal = str(result["fatal"])
        elif "outcomes" in result:
            self._results[trial.config["job"]] = result

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        index = trial.config["job"]
        result = self._results.pop(index, None)
        if result is None:
            self._ended(index, busy=None)
            if self._fatal is None:  # the worker ended well without a word
                self._lose(index, "the worker ended without a result", with_node=False)
            return
        self._ended(index, busy=result["busy"])
        self._shown.profile.merge(result["spent"])
        job = self._jobs[index]
        self.places.append({**result["place"], "whole": job.whole_device, "timed": job.timed})
        for computation, outcome in zip(job.computations, result["outcomes"], strict=True):
            if job.timed:
                self._shown.progress.timed(computation.trial, seconds=outcome["seconds"], error=outcome["error"])
            else:
                self._shown.progress.done(computation, seconds=outcome["seconds"], error=outcome["error"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A preempted node's job, which Tune itself hands out again."""
        self._ended(trial.config["job"], busy=None)
        self._shown.progress.lost(self._jobs[trial.config["job"]].trials, again=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        index, text = trial.config["job"], _error_text(trial)
        with_node = any(words in text for words in _NODE)
        self._lose(index, "its node was lost" if with_node else self._reason(index, text), with_node=with_node)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Ends the run where someone found that going on would lose results.

        Raises:
            StoreError: the reason.
        """
        if self._fatal is not None:
            raise StoreError(self._fatal)

    # --- clocks -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Account for workers without a job since the last event: starting, waiting for one, or at the end idle."""
        now = time.perf_counter()
        passed, free = now - self._since, max(0, self._shown.progress.at_once - len(self._began))
        if self._started:
            waiting = len(self._started) < len(self._jobs)
            self._shown.profile.add("hand_over" if waiting else "idle", free * passed)
        else:
            self._shown.profile.add("ray_start", passed)
        self._since = now

    def _ended(self, index: int, *, busy: float | None) -> None:
        self.tick()
        ran = self._since - self._began.pop(index, self._since)
        if busy is not None:
            self._shown.profile.add("hand_over", max(0.0, ran - busy))

    # --- losses -------------------------------------------------------------------------------------------------------

    def _lose(self, index: int, reason: str, *, with_node: bool) -> None:
        self._ended(index, busy=None)
        try:
            self._on_lost(Lost(self._jobs[index], reason, with_node))
        except StoreError as error:  # Tune would make an error of its own out of it
            self._fatal = str(error)

    def _reason(self, index: int, text: str) -> str:
        """Why a worker ended without a result, in one line."""
        where = self._stall(index)
        if where is not None:
            return f"no progress for {self._limit:g} s, the time limit: it stood at {where}"
        if any(words in text for words in _MEMORY):
            return "the machine's memory ran out and Ray ended the worker; use fewer --workers or a smaller --batch"
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
        if not lines or "died" in lines[0] or "unavailable" in lines[0]:
            what = "was killed or crashed, or its node was lost" if self._joined else "was killed or crashed"
            return f"the worker {what}; where memory ran out, use fewer --workers or a smaller --batch"
        return f"the worker ended: {lines[-1]}"  # the last line of a traceback


def _error_text(trial: Any) -> str:
    """What Tune has just written down of a failure."""
    try:
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):  # no file, or none named
        return ""
