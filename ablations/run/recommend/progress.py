"""How a search goes, in lines: the incumbent, what it beats, and the time left."""

from __future__ import annotations

import logging
import time

from ablations.search.race import Race
from ablations.words import duration

log = logging.getLogger(__name__)

_EVERY = 10.0  # seconds between lines


class SearchProgress:
    """Says now and then where a race stands. ``candidates``: how many a search tries."""

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates
        self._phase = ""
        self._began = self._said = 0.0
        self._before = 0  # candidates that an earlier run had ended already
        self._best = ""

    def told(self, phase: str, race: Race) -> None:
        """A candidate of a phase ended."""
        now = time.monotonic()
        ended = sum(1 for one in race.standings.values() if one.complete or one.ended)
        if phase != self._phase:
            self._phase, self._began, self._said, self._before = phase, now, 0.0, ended
            self._best = ""
        best = race.incumbent
        label = "" if best is None else best.candidate.label
        if now - self._said < _EVERY and label == self._best:
            return
        self._said, self._best = now, label
        total = self._candidates if phase.startswith("search") else None
        log.info("%s: %s", phase, ", ".join(self._words(ended, total, now, race)))

    def _words(self, ended: int, total: int | None, now: float, race: Race) -> list[str]:
        words = [f"{ended} of {total} candidates" if total else f"{ended} method{'s' if ended != 1 else ''}"]
        if race.incumbent is not None:
            words.append(f"best {100 * race.incumbent.mean:.1f} % ({race.incumbent.candidate.label})")
        if race.began_with is not None and race.incumbent is not race.began_with:
            gain = race.incumbent.mean - race.began_with.mean if race.incumbent is not None else 0.0
            words.append(f"{100 * gain:+.1f} points on {race.began_with.candidate.label}")
        since = ended - self._before
        if total and since > 0 and ended < total:
            words.append(f"{duration((now - self._began) / since * (total - ended))} left")
        return words
