"""Logs of trials, found by key: ``OUT/logs/<key>.log`` holds what was said while a trial was computed.

On a disk every line is there as soon as it is said, so that a worker which is killed leaves what it said until then;
in an object store the lines come when its job ends. Trials that are computed together have the same lines: what one of
them ran into may be why another took its time.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ablations.records.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "logs"
MAX_BYTES = 256 * 1024  # of one log: a trial that fails for ever must not fill the storage
_LISTENED = ("ablations", "reducers", "py.warnings")
_CUT = "… earlier attempts are left out\n"


class _Lines(logging.Handler):
    """Writes what one thread says to the log of each key; a log that cannot be written stops nothing."""

    def __init__(self, storage: Storage, keys: Sequence[str]) -> None:
        super().__init__(logging.DEBUG)
        self._storage, self._keys = storage, keys
        self._waiting: list[str] = []  # lines that the storage takes only when all are there
        self._broken = False
        self._bytes = 0  # written so far
        shape = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
        formatter = logging.Formatter(shape, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread or self._broken:
            return
        line = self.format(record) + "\n"
        self._bytes += len(line.encode())
        if self._bytes > MAX_BYTES and record.name != __name__:
            return  # nobody reads so much; how the job ended is still told
        with self.unless_broken():
            if not all(self._storage.append(f"{FOLDER}/{key}.log", line.encode()) for key in self._keys):
                self._waiting.append(line)

    def end(self) -> None:
        """Write what waits, and leave no log too long."""
        if self._broken:
            return
        with self.unless_broken():
            for key in self._keys:
                add_to_log(self._storage, key, "".join(self._waiting))

    @contextmanager
    def unless_broken(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # results matter, logs only help
            self._broken = True
            log.warning("the log of %s cannot be written (%s)", ", ".join(self._keys), error)


@contextmanager
def trial_log(storage: Storage, keys: Sequence[str]) -> Iterator[None]:
    """Write what this thread logs meanwhile into the log of each key."""
    lines = _Lines(storage, keys)
    with lines.unless_broken():
        storage.make(FOLDER)
    listened = [logging.getLogger(name) for name in _LISTENED]
    before = [logger.level for logger in listened]
    for logger in listened:
        logger.addHandler(lines)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
    started = time.monotonic()
    lines.handle(_record(logging.INFO, f"{len(keys)} trials on {platform.node()}, process {os.getpid()}"))
    try:
        yield
    except BaseException as error:
        record = _record(logging.ERROR, "ended by an error")
        record.exc_info = (type(error), error, error.__traceback__)
        lines.handle(record)
        raise
    finally:
        for logger, level in zip(listened, before, strict=True):
            logger.removeHandler(lines)
            logger.setLevel(level)
        lines.handle(_record(logging.INFO, f"over after {time.monotonic() - started:.1f} s"))
        lines.end()


def read_log(storage: Storage, key: str) -> str | None:
    """The log of a trial, or None where it left none."""
    try:
        return storage.read(f"{FOLDER}/{key}.log").decode("utf-8", errors="replace")
    except OSError:
        return None


def add_to_log(storage: Storage, key: str, text: str) -> None:
    """Add lines to the log of a trial, and cut its beginning where it grows too long; OSError where that fails."""
    whole = (read_log(storage, key) or "") + text
    if len(whole.encode()) > MAX_BYTES:
        whole = _CUT + whole.encode()[-MAX_BYTES:].decode("utf-8", errors="ignore").partition("\n")[2]
    elif not text:
        return
    storage.make(FOLDER)
    storage.write(f"{FOLDER}/{key}.log", whole.encode())


def add_line(storage: Storage, keys: Sequence[str], text: str) -> None:
    """Add one line from outside to the logs of trials, such as why their worker is gone."""
    lines = _Lines(storage, keys)
    with lines.unless_broken():
        storage.make(FOLDER)
    lines.handle(_record(logging.WARNING, text))
    lines.end()


def _record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, level, __file__, 0, text, None, None)
