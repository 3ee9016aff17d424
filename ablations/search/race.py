"""A search as it stands: what is being tried, what each candidate reached, and the best so far.

The serial run and Ray's driver tell it the same things and ask it the same questions; each thing told is an event of
the journal, so that a search that was stopped goes on from just where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ablations.search.errors import SearchError
from ablations.search.planner import Candidate, Planner
from ablations.search.rungs import Test, goes_on

ASKED, RUNG, FAILED, LOST = "asked", "rung", "failed", "lost"  # kinds of events

Event = dict[str, Any]


@dataclass
class Standing:
    """A candidate and what is known of it."""

    candidate: Candidate
    keys: list[str] = field(default_factory=list)  # of its trials, rung by rung
    values: list[np.ndarray] = field(default_factory=list)  # of the images that each rung added
    ended: str = ""  # why before the last rung; "" while it runs and where it reached the end
    complete: bool = False  # it was looked at on the whole search part

    @property
    def seen(self) -> np.ndarray:
        """Its values on all images it was looked at."""
        return np.concatenate(self.values) if self.values else np.zeros(0)

    @property
    def mean(self) -> float:
        return float(self.seen.mean())


class Race:
    """Candidates of one planner, against one another and against an incumbent.

    Args:
        planner: who proposes them.
        rungs: how many rungs there are.
        dense: (n,) the dense model's values on the search images: a candidate is told by its loss against them.
        test: the paired test by which a candidate is found worse.
        incumbent: whom the first candidates must not be worse than.
        halving: whether candidates end early; else each is looked at on every image.
        keep: where events are kept, if anywhere.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        rungs: int,
        dense: np.ndarray,
        test: Test,
        incumbent: Standing | None = None,
        halving: bool = True,
        keep: Callable[[Event], None] | None = None,
    ) -> None:
        self._planner, self._rungs, self._dense, self._test = planner, rungs, dense, test
        self.incumbent = self.began_with = incumbent
        self._halving, self._keep = halving, keep
        self.standings: dict[int, Standing] = {}
        self._means: list[list[float]] = [[] for _ in range(rungs)]  # of those that reached each rung
        self._waiting: list[Candidate] = []  # asked before a stop, and not ended
        self._lost: set[int] = set()  # of which the planner heard that they have no value: it is told no second time

    # --- what is told -------------------------------------------------------------------------------------------------

    def ask(self) -> Candidate | None:
        """The next candidate; None where there is none."""
        if self._waiting:
            return self._waiting.pop(0)
        candidate = self._planner.ask()
        if candidate is not None:
            training = {"training": candidate.training.text} if candidate.training else {}
            self._told({"event": ASKED, "number": candidate.number, "stages": candidate.stages.text, **training})
            self.standings[candidate.number] = Standing(candidate)
        return candidate

    def report(self, number: int, key: str, values: np.ndarray) -> bool:
        """A candidate's values on the images of its next rung; whether it goes on."""
        standing = self.standings[number]
        rung = len(standing.values)
        self._told({"event": RUNG, "number": number, "key": key})
        standing.keys.append(key)
        standing.values.append(np.asarray(values, dtype=float))
        mean, seen = standing.mean, self._means[rung]
        if rung + 1 == self._rungs:
            standing.complete = True
            if self.incumbent is None or mean > self.incumbent.mean:
                self.incumbent = standing
        elif self._halving:
            best = None if self.incumbent is None else self.incumbent.seen[: len(standing.seen)]
            _, standing.ended = goes_on(standing.seen, best, seen, test=self._test)
        seen.append(mean)
        on = not standing.complete and not standing.ended
        if not on:
            self._tell(number, mean - float(self._dense[: len(standing.seen)].mean()))
        return on

    def fail(self, number: int, reason: str) -> None:
        """A candidate gave no value: the cost is out of its reach, or its trial failed."""
        self._told({"event": FAILED, "number": number, "reason": reason})
        self.standings[number].ended = reason
        self._tell(number, None)

    def lose(self, number: int, reason: str) -> None:
        """Who looked at a candidate was lost, by no fault of the candidate: a search that is resumed tries it again."""
        self._told({"event": LOST, "number": number, "reason": reason})
        self.standings[number].ended = reason
        self._tell(number, None)
        self._lost.add(number)

    def _tell(self, number: int, value: float | None) -> None:
        if number not in self._lost:
            self._planner.tell(number, value)

    def _told(self, event: Event) -> None:
        if self._keep is not None:
            self._keep(event)

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def asked(self) -> int:
        """Candidates that were looked at, or begun."""
        return len(self.standings)

    @property
    def complete(self) -> list[Standing]:
        """Those that were looked at on the whole search part, the best first; of equals, the earlier."""
        return sorted((one for one in self.standings.values() if one.complete), key=lambda one: -one.mean)

    def resume(self, events: Iterable[Event], values_of: Callable[[str, int], np.ndarray | None]) -> None:
        """Stand where the search stood when it was stopped; ``values_of`` gives a trial's values by its key
        and its rung.

        Raises:
            SearchError: what was tried then is not what would be tried now, or its results are gone.
        """
        keep, self._keep = self._keep, None
        try:
            running = self._replay(events, values_of)
        except SearchError:
            raise
        except (LookupError, TypeError, ValueError) as error:  # an event that lacks something, or holds nonsense
            raise SearchError(f"its journal is damaged: {type(error).__name__}: {error}") from error
        finally:
            self._keep = keep
        self._waiting = [self.standings[number].candidate for number in running]

    def _replay(self, events: Iterable[Event], values_of: Callable[[str, int], np.ndarray | None]) -> list[int]:
        running, lost = list[int](), list[int]()
        for event in events:
            kind, number = event["event"], event["number"]
            if kind == ASKED:
                self._ask_again(number, event["stages"], event.get("training", ""))
                running.append(number)
                continue
            if number in lost:  # an earlier resumption tried it again
                lost.remove(number)
                running.append(number)
                self.standings[number].ended = ""
            if number not in running:
                raise SearchError("its journal tells of a candidate that was not running")
            if not self._report_again(event, values_of):
                running.remove(number)
                lost += [number] * (kind == LOST)
        for number in lost:
            self.standings[number].ended = ""
        return running + lost

    def _ask_again(self, number: int, stages: str, training: str) -> None:
        candidate, asked = self.ask(), (number, stages, training)
        if candidate is None or (candidate.number, candidate.stages.text, candidate.training.text) != asked:
            raise SearchError("another search would be made by now")

    def _report_again(self, event: Event, values_of: Callable[[str, int], np.ndarray | None]) -> bool:
        """What an event tells of a candidate; whether it goes on."""
        kind, number = event["event"], event["number"]
        if kind in (FAILED, LOST):
            (self.fail if kind == FAILED else self.lose)(number, event["reason"])
            return False
        if kind != RUNG:
            raise SearchError(f"its journal is damaged: it tells of {kind!r}")
        values = values_of(event["key"], len(self.standings[number].values))
        if values is None:
            raise SearchError(f"the result of {event['key']} is gone")
        return self.report(number, event["key"], values)
