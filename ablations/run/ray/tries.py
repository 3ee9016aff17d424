"""What is tried again after a worker was lost, how often, and when it is given up.

A job whose machine went is handed out again as it was. A job whose worker crashed may hold one trial that takes the
others down with it, so its trials are tried one by one. Every trial has a bounded number of tries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ablations.run.jobs import Computation, Job
from ablations.trial.trial import Trial

TRIES = 3  # times that a trial is begun whose worker crashes, or hangs, with it
NODES = 8  # nodes that a trial may lose under it


@dataclass(frozen=True)
class GivenUp:
    """A computation that is not tried again."""

    computation: Computation
    reason: str


class Tries:
    """Counts what each trial went through; ``finished`` says whether a trial needs nothing any more."""

    def __init__(self, finished: Callable[[Trial, bool], bool]) -> None:
        self._finished = finished
        self._crashes: Counter[str] = Counter()  # by key of the evaluated trial
        self._nodes: Counter[str] = Counter()

    def after(self, job: Job, reason: str, *, with_node: bool) -> tuple[list[Job], list[GivenUp], list[Computation]]:
        """After a job was lost: (what to hand out again, what to give up, what had been finished all the same)."""
        finished = [one for one in job.computations if all(self._finished(t, job.timed) for t in one.answers)]
        left = [one for one in job.computations if one not in finished]
        counted, most = (self._nodes, NODES) if with_node else (self._crashes, TRIES)
        counted.update(one.trial.key for one in left)
        given_up = [
            GivenUp(one, f"{reason} (tried {self._tried(one)} times)") for one in left if counted[one.trial.key] >= most
        ]
        again = [one for one in left if counted[one.trial.key] < most]
        together = with_node or (job.computations[0].trial.training and self._first_crash(again))
        return _jobs(again, timed=job.timed, together=bool(together)), given_up, finished

    def _tried(self, computation: Computation) -> int:
        return self._crashes[computation.trial.key] + self._nodes[computation.trial.key]

    def _first_crash(self, computations: Iterable[Computation]) -> bool:
        """Trials of one training stay together once: it is trained once, and may be what crashed."""
        return all(self._crashes[one.trial.key] <= 1 for one in computations)


def _jobs(computations: list[Computation], *, timed: bool, together: bool) -> list[Job]:
    if not computations:
        return []
    if together:
        return [Job(tuple(computations), timed=timed)]
    return [Job((one,), timed=timed) for one in computations]
