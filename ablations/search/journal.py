"""Journals of searches: a line of JSON each, appended as things happen, read again by a search that goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Event = dict[str, Any]


class Journal:
    """The events of one search, by phase (``singles 0.5``, ``search 0.5``). A last line that was cut short is dropped.

    ``identity`` is plain data on everything the search depends on; a file that begins with another is begun anew.
    """

    def __init__(self, path: Path, *, identity: Any) -> None:
        self.path, self._identity = path, json.loads(json.dumps(identity))
        known = self._read()
        self._events: list[Event] = known or []
        if known is None:
            self._write([{"identity": self._identity}])

    def of(self, phase: str) -> list[Event]:
        """The events of a phase, in their order."""
        return [event for event in self._events if event["phase"] == phase]

    def add(self, phase: str, event: Event) -> None:
        """Append an event; it is on disk when this returns."""
        told = {"phase": phase, **event}
        self._events.append(told)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")

    def forget(self, phase: str) -> None:
        """Begin a phase anew."""
        self._events = [event for event in self._events if event["phase"] != phase]
        self._write([{"identity": self._identity}, *self._events])

    def _write(self, lines: list[Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.path)

    def _read(self) -> list[Event] | None:
        """None where there is no journal of this search."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        lines = text.split("\n")
        whole, cut = lines[:-1], lines[-1]  # what a killed process began to write ends in no newline
        try:
            told = [json.loads(line) for line in whole]
            if not told or told[0] != {"identity": self._identity}:
                return None
            events = told[1:]
            if any(not isinstance(event, dict) or "event" not in event or "phase" not in event for event in events):
                raise ValueError("a line is no event")
        except ValueError as error:
            log.warning("%s cannot be read (%s): the search begins anew; finished trials are not computed again",
                        self.path, error)  # fmt: skip
            return None
        if cut:
            self._write([{"identity": self._identity}, *events])
        return events
