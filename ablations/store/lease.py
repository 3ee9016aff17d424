"""One run at a time where files cannot be locked: object stores, and network disks that know no locks.

The run that holds the place writes a small file again and again, with its own name and a count. Whoever comes later
looks at that file for a while: if it changes, the other run lives, and if it does not, it has died. Nobody compares a
time with another machine's, so clocks may say what they like. Two that come in the same moment both write and look
again: the one that wrote last finds itself there.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ablations.records.storage import Storage, StoreError

log = logging.getLogger(__name__)

NAME = "lease.json"
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 3.5  # beats without one after which a run counts as dead


@contextmanager
def leased(storage: Storage, *, beat: float = BEAT) -> Iterator[None]:
    """Hold the place; StoreError if another run does. The holder's death frees it after ``PATIENCE`` beats."""
    own = {"run": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid()}
    _wait_for_earlier(storage, beat=beat)
    _write(storage, {**own, "count": 0})
    time.sleep(beat / 4)  # let whoever came at the same moment write as well
    found = holder(storage)
    if found is None or found.get("run") != own["run"]:
        raise _taken(storage, found)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(storage, own, ended, beat), daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        found = holder(storage)
        if found is not None and found.get("run") == own["run"]:
            with suppress(OSError):  # it will be found dead
                storage.delete(NAME)


def holder(storage: Storage) -> dict[str, Any] | None:
    """What the holder last wrote, or None; it need not live any more."""
    try:
        found = json.loads(storage.read(NAME))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _wait_for_earlier(storage: Storage, *, beat: float) -> None:
    first = holder(storage)
    if first is None:
        return
    log.info("another run was here (%s): waiting to see whether it still works", _who(first))
    until = time.monotonic() + PATIENCE * beat
    while time.monotonic() < until:
        time.sleep(beat / 4)
        found = holder(storage)
        if found is None:
            return  # it ended
        if found != first:
            raise _taken(storage, found)
    log.info("it has died: going on in its place")


def _beat(storage: Storage, own: dict[str, Any], ended: threading.Event, beat: float) -> None:
    count = 0
    while not ended.wait(beat):
        count += 1
        found = holder(storage)
        if found is not None and found.get("run") != own["run"]:
            log.warning("%s has taken %s over: both runs go on, and do some work twice", _who(found), storage.location)
            return
        with suppress(OSError):  # the next beat may get through
            _write(storage, {**own, "count": count})


def _write(storage: Storage, content: dict[str, Any]) -> None:
    storage.write(NAME, json.dumps(content).encode())


def _who(found: dict[str, Any] | None) -> str:
    return "another run" if found is None else f"process {found.get('pid')} on {found.get('host')}"


def _taken(storage: Storage, found: dict[str, Any] | None) -> StoreError:
    return StoreError(
        f"another run ({_who(found)}) is writing to {storage.location}; wait for it to end, or choose another place "
        "with --out"
    )
