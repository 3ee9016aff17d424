"""Live progress with the time left: a bar on a terminal, plain log lines anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from ablations.plan import Job

log = logging.getLogger(__name__)

_EVERY = 15.0  # seconds between lines where there is no terminal


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class RunProgress:
    """Counts finished trials and tells the time left, from what jobs took so far and their estimated costs.

    ``at_once`` is how many jobs run side by side; the runner sets it. A context manager: leaving it ends the bar, also
    when the run is interrupted.
    """

    def __init__(self, jobs: Sequence[Job], *, terminal: bool | None = None) -> None:
        self.total = sum(len(job.trials) for job in jobs)
        self.at_once = 1
        self.finished = 0
        self.failures: list[tuple[str, str]] = []  # (trial in words, reason)
        self._cost_left = sum(job.cost for job in jobs)
        self._cost_done = self._seconds_done = 0.0
        self._started = self._said = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("trials", total=self.total, left="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    def seconds_left(self) -> float | None:
        """An estimate, or None before the first job is done. The start of workers is no job and does not count."""
        if self._cost_done <= 0:
            return None
        return self._seconds_done / self._cost_done * self._cost_left / self.at_once

    def done(self, job: Job, *, seconds: float = 0.0, error: str | None = None) -> None:
        """A job ended after ``seconds`` of work, well or with a reason why not."""
        self.finished += len(job.trials)
        self._cost_left = max(0.0, self._cost_left - job.cost)
        if seconds > 0:
            self._cost_done += job.cost
            self._seconds_done += seconds
        if error is not None:
            for trial in job.trials:
                self.failures.append((f"{trial.spec}: {trial.variant} (x = {trial.x})", error))
                log.warning("failed: %s: %s: %s", trial.spec, trial.variant, error)
        left = self.seconds_left()
        text = "" if left is None else f"{duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished, left=text)
        elif time.monotonic() - self._said > _EVERY or self.finished == self.total:
            self._said = time.monotonic()
            log.info("%d of %d trials, %s", self.finished, self.total, text or "done")
