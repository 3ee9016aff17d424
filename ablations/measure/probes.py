"""What calibration has tried already: costs of settings, remembered on disk for every worker and every later run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablations.records.locks import lock

log = logging.getLogger(__name__)


class Probes(MutableMapping[Any, float]):
    """A dictionary from (family, setting) to a mean cost that outlives its process.

    One line of JSON each, appended under a lock and read again when the file has grown: workers find what others
    tried, and a line that was cut short by a kill is skipped. A cost depends on its key alone, so it does not matter
    who computed it: ``identity`` names everything else it depends on, such as the images and the number of threads.
    """

    def __init__(self, folder: Path, *, identity: object) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.path = folder / f"probes-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._known: dict[str, float] = {}
        self._read = 0  # bytes of the file that are known

    def __getitem__(self, key: Any) -> float:
        text = _text(key)
        if text not in self._known:
            self._read_on()
        return self._known[text]

    def __setitem__(self, key: Any, cost: float) -> None:
        text = _text(key)
        self._known[text] = cost
        try:
            with self.path.open("a+b") as file:
                with suppress(OSError):  # a disk or a system without locks: lines may mix, and mixed ones are skipped
                    lock(file, wait=True)
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                whole = not end or file.read(1) == b"\n"
                file.write(b"" if whole else b"\n")  # what a killed process began must not spoil this line
                file.write(json.dumps([text, cost]).encode() + b"\n")
        except OSError as error:  # a cache that cannot be written costs time, not results
            log.debug("%s cannot be written (%s)", self.path, error)

    def __delitem__(self, key: Any) -> None:
        raise TypeError("what has been tried stays known")

    def __iter__(self) -> Iterator[Any]:
        self._read_on()
        return (tuple(json.loads(text)) for text in list(self._known))

    def __len__(self) -> int:
        self._read_on()
        return len(self._known)

    def _read_on(self) -> None:
        """Take in what others have appended, whole lines only."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except OSError:
            return
        whole = new.rfind(b"\n") + 1
        self._read += whole
        for line in new[:whole].splitlines():
            try:
                text, cost = json.loads(line)
                self._known.setdefault(str(text), float(cost))
            except (ValueError, TypeError):
                continue


def _text(key: Any) -> str:
    """One text for one key; a key is a tuple of texts and numbers."""
    return json.dumps([part if isinstance(part, str | int | float) else str(part) for part in key])
