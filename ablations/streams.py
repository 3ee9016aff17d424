"""Standard streams that are closed from the start (``>&-``), or whose reader goes (``| head``). Standard library alone.

What a command prints is for looking: where nobody looks any more, a command that computes goes on and keeps its
results, and one that only shows ends quietly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from ablations.records.streams import silence

_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


class _Lasting:
    """A stream to which writing never fails: once nothing can be written, all that follows goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # its reader, its terminal or its disk has no place for it
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams(*, lasting: bool) -> Iterator[None]:
    """Three streams that are open, while a command runs; ``lasting``: that nobody reads what it prints ends nothing."""
    _open_closed()
    with ExitStack() as stack:
        stack.enter_context(redirect_stderr(cast(TextIO, _Lasting(sys.stderr))))
        if lasting:
            stack.enter_context(redirect_stdout(cast(TextIO, _Lasting(sys.stdout))))
        try:
            yield
        finally:
            if lasting:
                sys.stdout.flush()  # else what waits fails as the interpreter ends


def _open_closed() -> None:
    """Open what the caller has closed: a file of ours must not come to stand where text is printed to."""
    for number, name, mode in _STREAMS:
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number and not _is_open(number):
                os.dup2(handle, number)
                os.close(handle)
                handle = number
            os.set_inheritable(handle, True)  # as standard streams are, for the processes that a run starts
            setattr(sys, name, os.fdopen(handle, mode, encoding="utf-8"))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


__all__ = ["silence", "standard_streams"]
