"""How long a run still takes: work that workers divide, and trials that are timed alone, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from ablations.measure.speed import expected_seconds
from ablations.run.jobs import SPEED, Computation
from ablations.trial.trial import Trial

TIMING = 8.0  # seconds that timing a trial takes, where nothing is known of its model's speed


class Pace:
    """The time left, from what was done so far and what all of it was estimated to cost.

    A timing is expected to take what its rounds take at the speed that evaluations had; once some trials are timed,
    all others are as much slower or faster than expected as these were.
    """

    def __init__(self, work: Sequence[Computation], timed: Sequence[Trial]) -> None:
        self._cost_left = sum(computation.cost for computation in work)
        self._cost_done = self._seconds_done = 0.0
        self._about = {trial.key: computation for computation in work for trial in computation.answers}
        self._to_time = {trial.key: trial for trial in timed}
        self._timed: list[tuple[Trial, float]] = []  # and the seconds each took

    def evaluated(self, computation: Computation, *, seconds: float, failed: bool) -> None:
        """A computation ended; where it failed, what was to be timed of it will not be."""
        self._cost_left = max(0.0, self._cost_left - computation.cost)
        if seconds > 0:
            self._cost_done += computation.cost
            self._seconds_done += seconds
        if failed:
            for trial in computation.answers:
                self._to_time.pop(trial.key, None)

    def timed(self, trial: Trial, *, seconds: float) -> None:
        """A trial has been timed, or cannot be (0 seconds)."""
        self._to_time.pop(trial.key, None)
        if seconds > 0:
            self._timed.append((trial, seconds))

    def seconds_left(self, *, at_once: int) -> float | None:
        """An estimate, or None before anything is done; ``at_once`` workers divide all but the timings."""
        timings = self._timings_left(at_once)
        if self._cost_left <= 0:
            return timings
        if self._cost_done <= 0:
            return None
        return self._seconds_done / self._cost_done * self._cost_left / at_once + timings

    def _timings_left(self, at_once: int) -> float:
        expected = sum(self._expected(trial, at_once) for trial in self._to_time.values())
        before = sum(self._expected(trial, at_once) for trial, _ in self._timed)
        return expected * sum(seconds for _, seconds in self._timed) / before if before else expected

    def _expected(self, trial: Trial, at_once: int) -> float:
        """Seconds for timing a trial; it then has the cores or the GPU that ``at_once`` evaluations share."""
        about = self._about.get(trial.key)
        if about is None or self._cost_done <= 0 or trial.images < 1:
            return TIMING
        batch = self._seconds_done / self._cost_done * trial.batch / trial.images / at_once
        return expected_seconds(reduced=batch * about.cost, dense=batch * (about.dense or about.cost))


def to_be_timed(computation: Computation) -> list[Trial]:
    """The trials that a computation answers and that are still to be timed then."""
    return [trial for trial in computation.answers if trial.measure == SPEED]
