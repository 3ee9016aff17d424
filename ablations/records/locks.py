"""Locks on files, which operating systems do each in its own way. No other module asks.

Linux and macOS lock with ``fcntl``, Windows with ``msvcrt``; where there is neither, asking for a lock raises OSError,
as it does on a network disk that knows no locks, and whoever asked goes on without one (a run then holds its place by
``lease``). Standard library alone.
"""

from __future__ import annotations

import errno
import importlib
import os
import time
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_BYTE = 2**31 - 2  # Windows locks bytes, and nobody else may read them: one far behind the end of every file of ours
_AGAIN = 0.1  # seconds; Windows cannot wait for a lock without end


def _module(name: str) -> Any:
    """A module of one operating system, or None on the others."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_fcntl, _msvcrt = _module("fcntl"), _module("msvcrt")


def lock(file: IO[Any], *, wait: bool = False, shared: bool = False) -> None:
    """Lock an open file; the lock ends with the file, and with the process, however it ends.

    ``shared`` locks exclude exclusive ones alone; on Windows every lock is exclusive.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is not set.
        OSError: this system, or this disk, knows no locks.
    """
    if _fcntl is not None:
        kind = _fcntl.LOCK_SH if shared else _fcntl.LOCK_EX
        _fcntl.flock(file, kind if wait else kind | _fcntl.LOCK_NB)
    elif _msvcrt is not None:
        while not _lock_byte(file):
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock")
            time.sleep(_AGAIN)
    else:
        raise OSError(errno.ENOTSUP, "this system knows no locks on files")


def _lock_byte(file: IO[Any]) -> bool:
    """Lock the byte that stands for the file; whether nobody else holds it."""
    with _at(file.fileno(), _BYTE) as handle:
        try:
            _msvcrt.locking(handle, _msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
    return True


@contextmanager
def _at(handle: int, place: int) -> Iterator[int]:
    """An open file at another place for a moment: ``msvcrt`` locks from where the file stands."""
    before = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, place, os.SEEK_SET)
    try:
        yield handle
    finally:
        with suppress(OSError):
            os.lseek(handle, before, os.SEEK_SET)
