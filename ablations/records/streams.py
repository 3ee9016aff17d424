"""Printing where nobody may look: to a stream that is closed (``>&-``), or whose reader has gone (``| head``)."""

from __future__ import annotations

import os
from typing import TextIO


def silence(stream: TextIO) -> None:
    """Let what is written to a stream, and what still waits in it, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())  # what waits in the stream would fail as the interpreter ends
    os.close(nowhere)


def say(text: str, stream: TextIO | None) -> None:
    """Print a line. That it cannot be read any more changes nothing of what was written, and is no error."""
    if stream is None:
        return
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        silence(stream)
