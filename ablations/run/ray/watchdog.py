"""A watch over work that may hang: a process in which nothing moves for too long ends, and says where it stood.

What hangs cannot be asked to stop, least of all inside a compiled kernel or a read from a dead disk. So the process
ends as a whole, by a thread of the interpreter that needs no lock of it (``faulthandler``), after it has written down
the stack of every thread. Whoever handed out the work sees a lost worker and reads the reason here. Standard library
alone.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LIMIT = 3600.0  # seconds without any progress: no single step of a trial takes as long
_OFTEN = 50  # the clock is set back at most so many times within the limit
_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)')
_OURS = re.compile(r"[/\\](?:ablations|reducers)[/\\]")


class Watch:
    """Counts the seconds since the last sign of progress; beyond ``limit`` the process ends. None: it never does.

    A limit is kept to within a fiftieth. One watch serves one process: there is one such clock in it.
    """

    def __init__(self, limit: float | None) -> None:
        if limit is not None and limit <= 0:
            raise ValueError(f"a limit of {limit:g} seconds leaves no time to do anything; give more, or none at all")
        self.limit = limit
        self._file: Any = None
        self._set = 0.0  # when the clock was last set back

    @contextmanager
    def over(self, path: Path) -> Iterator[None]:
        """Watch over the block. Where it hangs, ``path`` holds the stacks; else the file is gone afterwards."""
        with ExitStack() as open_files:
            if self.limit is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open_files.enter_context(path.open("w", encoding="utf-8"))
                except OSError as error:  # a full disk: the work may go on, and will say so itself
                    log.warning("%s cannot be written (%s): work that hangs will not be ended", path, error)
            self._set = -math.inf
            try:
                self.beat()
                yield
            finally:
                if self._file is not None:
                    faulthandler.cancel_dump_traceback_later()
                    self._file = None
                    with suppress(OSError):
                        path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Something has moved. May be called often."""
        if self._file is None or self.limit is None:
            return
        now = time.monotonic()
        if now - self._set < self.limit / _OFTEN:
            return
        self._set = now
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self._file)


def place_of_stall(path: Path) -> str | None:
    """Where the work stood, from what a watch left at ``path``: ``calibrate.py:112 in mean_cost``;
    None if it did not hang.

    Of several threads the one that runs this project's code counts, and in it the innermost line of that code.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if "Timeout" not in text:
        return None
    frames = list(_FRAME.finditer(text))
    ours = [frame for frame in frames if _OURS.search(frame["file"])]
    for frame in [*ours, *frames][:1]:
        return f"{Path(frame['file']).name}:{frame['line']} in {frame['name']}"
    return "an unknown place"


__all__ = ["LIMIT", "Watch", "place_of_stall"]
