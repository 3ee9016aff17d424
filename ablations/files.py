"""Files that appear whole or not at all, and work that only one process does at a time. Standard library alone."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a temporary file beside ``path`` that takes its name only when whole and on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files private; results are for reading
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Wait until no other process holds this lock file; the lock ends with the process, however it ends."""
    with path.open("a") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting: another process is busy with %s", what)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network disks know no locks: two processes there only do work twice
            log.debug("%s cannot be locked (%s)", path, error)
        yield
