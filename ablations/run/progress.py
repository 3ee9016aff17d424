"""Live progress with the time left: a bar on a terminal, plain lines elsewhere, and a file for other terminals.

The bar is drawn by rich; where that is not installed there are lines.

All clocks are monotonic: a machine whose clock is wrong or is set while a run goes on shows the same.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ablations.records.names import LIVE
from ablations.run.jobs import Computation
from ablations.run.pace import Pace, to_be_timed
from ablations.trial.trial import Trial
from ablations.words import duration, in_words

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ablations.store.store import Store

log = logging.getLogger(__name__)

_EVERY = 15.0  # seconds between lines where there is no terminal
_SHOWN = (2.0, 15.0)  # seconds between two states of the file: on a disk, in an object store


class RunProgress:
    """Counts finished trials and tells the time left, from what computations took so far and their estimated costs.

    ``at_once`` is how many workers compute side by side; the runner sets it. ``timed`` are trials that are timed alone
    after all else. A context manager: leaving it ends the bar, also when the run is interrupted. With a ``store``,
    ``progress.json`` there tells the same to ``sievit status --watch``.
    """

    def __init__(
        self,
        work: Sequence[Computation],
        *,
        timed: Sequence[Trial] = (),
        terminal: bool | None = None,
        store: Store | None = None,
    ) -> None:
        self.total = len({trial.key for trial in (*(t for one in work for t in one.answers), *timed)})
        self.at_once = 1
        self.finished = 0
        self.failures: list[tuple[str, str]] = []  # (trial in words, reason)
        self.retried = 0  # computations that were handed out again
        self._running: set[str] = set()  # keys of trials
        self._store, self._written = store, 0.0
        self._pace = Pace(work, timed)
        self._started = self._said = time.monotonic()
        self._task: TaskID
        self._bar = _bar() if (sys.stderr.isatty() if terminal is None else terminal) else None

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
        self._show(now=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    def seconds_left(self) -> float | None:
        """An estimate, or None before anything is done. The start of workers is no computation and does not count."""
        return self._pace.seconds_left(at_once=self.at_once)

    def began(self, trials: Sequence[Trial]) -> None:
        """Trials are being computed now."""
        self._running |= {trial.key for trial in trials}
        self._show()

    def lost(self, trials: Sequence[Trial], *, again: bool) -> None:
        """Trials ended without a result; ``again``: they will be handed out once more."""
        self._running -= {trial.key for trial in trials}
        self.retried += again
        self._show()

    def done(self, computation: Computation, *, seconds: float = 0.0, error: str | None = None) -> None:
        """A computation ended after ``seconds`` of work, well or with a reason why not."""
        self._running -= {trial.key for trial in computation.answers}
        self._pace.evaluated(computation, seconds=seconds, failed=error is not None)
        if error is not None:
            self._failed(computation.answers, error)
            self._advance(len(computation.answers))
        else:
            self._advance(len(computation.answers) - len(to_be_timed(computation)))

    def timed(self, trial: Trial, *, seconds: float = 0.0, error: str | None = None) -> None:
        """A trial has been timed, the last it needed."""
        self._running.discard(trial.key)
        self._pace.timed(trial, seconds=seconds if error is None else 0.0)
        if error is not None:
            self._failed([trial], error)
        self._advance(1)

    def trained(self, trials: Sequence[Trial], epoch: Mapping[str, Any]) -> None:
        """An epoch of the finetuning that these trials wait for is over."""
        facts = [f"epoch {epoch.get('epoch')} of {epoch.get('epochs')}"]
        if isinstance(epoch.get("loss"), float):
            facts.append(f"loss {epoch['loss']:.3f}")
        if isinstance(epoch.get("top1"), float):
            facts.append(f"top-1 {100 * epoch['top1']:.1f} %")
        if isinstance(epoch.get("eta"), int | float):
            facts.append(f"{duration(epoch['eta'])} left")
        text = f"finetuning for {trials[0].spec}, {trials[0].variant}: {', '.join(facts)}"
        if self._bar is not None:
            self._bar.update(self._task, left=text)
        else:
            log.info("%s", text)

    def _failed(self, trials: Sequence[Trial], error: str) -> None:
        for trial in trials:
            self.failures.append((f"{trial.spec}: {in_words(trial.variant, trial.x)}", error))
            log.warning("failed: %s: %s: %s", trial.spec, trial.variant, error)

    def _advance(self, trials: int) -> None:
        self.finished += trials
        left = self.seconds_left()
        text = "" if left is None else f"{duration(left)} left"
        if self.failures:
            text = f"{len(self.failures)} failed{', ' if text else ''}{text}"
        self._show()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished, left=text)
        elif time.monotonic() - self._said > _EVERY or self.finished == self.total:
            self._said = time.monotonic()
            log.info("%d of %d trials, %s", self.finished, self.total, text or "done")

    def _show(self, *, now: bool = False) -> None:
        """Write the state where another terminal finds it, now and then: it is for looking, nothing depends on it."""
        if self._store is None:
            return
        if not now and time.monotonic() - self._written < _SHOWN[self._store.remote]:
            return
        self._written = time.monotonic()
        state = {
            "finished": self.finished,
            "total": self.total,
            "failed": len(self.failures),
            "at_once": self.at_once,
            "seconds_left": self.seconds_left(),
            "running": sorted(self._running),
            "retried": self.retried,
        }
        try:
            self._store.write_json(LIVE, state)
        except OSError as error:
            log.debug("%s cannot be written (%s)", LIVE, error)


def _bar() -> Progress | None:
    """A bar with the trials that are finished and the time left; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
    except ImportError:
        return None
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
    )
