"""Files that appear whole or not at all, and work that only one process does at a time. Standard library alone."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ablations.records.locks import lock

log = logging.getLogger(__name__)


def cache_home() -> Path:
    """Where this machine keeps what belongs to no folder of results: ``$SIEVIT_CACHE``, or ``~/.cache/sievit``."""
    chosen = os.environ.get("SIEVIT_CACHE")
    return user_path(chosen).absolute() if chosen else Path.home() / ".cache" / "sievit"


def user_path(text: str | Path) -> Path:
    """A path as a person gives it: ``~`` is the home folder, also where no shell has seen to it (``--data=~/images``,
    ``make DATA='~/images'``, a settings object).
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home of a user who does not exist: a folder of that name, which is most likely missing
        return Path(text)


def absolute(path: str | None) -> str | None:
    """A file or folder by its full path, for whoever runs elsewhere."""
    return None if path is None else str(user_path(path).absolute())


@contextmanager
def atomic(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Write to a temporary file beside ``path`` that takes its name only when whole; ``lasting``: and on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if lasting:
            with temporary.open("r+b") as file:  # Windows syncs no file that is open for reading alone
                os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files private; results are for reading
        temporary.replace(path)
        if lasting:
            _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk as well: a machine that loses power must not forget what it finished."""
    with suppress(OSError):  # some file systems cannot, and need not
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_bytes(value: object) -> bytes:
    """JSON in UTF-8, readable by a person."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def read_json(path: Path) -> Any:
    """The JSON of a file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Wait until no other process holds this lock file; the lock ends with the process, however it ends."""
    with path.open("a") as file:
        try:
            try:
                lock(file)
            except BlockingIOError:
                log.info("waiting: another process is busy with %s", what)
                lock(file, wait=True)
        except OSError as error:  # some disks and systems know no locks: two processes there only do work twice
            log.debug("%s cannot be locked (%s)", path, error)
        yield
