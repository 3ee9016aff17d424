"""Where a private Ray keeps its sockets and logs: a short folder of the run's own, found before anything is computed.

Ray would take ``/tmp/ray``, whoever made it, or ``$TMPDIR/ray``, however long that is; a socket's path has little room.
Does not import Ray, which takes seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ablations.records.files import user_path
from ablations.run.ray.address import address

_SOCKET = "/ray/session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store"  # what Ray puts below the folder
_LONGEST = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path (sun_path, less its last)
LONGEST = _LONGEST - len(_SOCKET)
"""Bytes of the folder's path for which Ray's sockets still have names that the system takes."""
_USUAL = ("/tmp", "/var/tmp", "/dev/shm")
_PREFIX = "sv"


def check_ray_folder() -> None:
    """Find out now whether a private Ray would have a folder, and not when it starts.

    Raises:
        OSError: it would not; the message names the way out.
    """
    with ray_folder():
        pass


@contextmanager
def ray_folder(usual: Sequence[str] | None = None) -> Iterator[Path | None]:
    """The folder that ``RAY_TMPDIR`` names for Ray meanwhile; None where a cluster is joined, which has its own.

    What the person has set as ``RAY_TMPDIR`` is taken as it is, and stays; a folder that is made here goes in the end.
    ``usual`` are the places to look for room, in their order.

    Raises:
        OSError: there is no folder that Ray can use.
    """
    if address() is not None:
        yield None
        return
    chosen = os.environ.get("RAY_TMPDIR")
    folder = _chosen(chosen) if chosen else _made([tempfile.gettempdir(), *_USUAL] if usual is None else usual)
    os.environ["RAY_TMPDIR"] = str(folder)  # Ray's processes read it as well
    try:
        yield folder
    finally:
        if chosen:
            os.environ["RAY_TMPDIR"] = chosen
        else:
            del os.environ["RAY_TMPDIR"]
            shutil.rmtree(folder, ignore_errors=True)


def _chosen(text: str) -> Path:
    """The folder that ``RAY_TMPDIR`` names."""
    folder = user_path(text).absolute()
    reason = _too_long(folder)
    if reason is None:
        try:
            (folder / "ray").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder / "ray").close()
        except OSError as error:
            reason = f"cannot be written ({error.strerror or error})"
    if reason is not None:
        raise OSError(f"RAY_TMPDIR={text} {reason}; name another folder for Ray's sockets, or unset it")
    return folder


def _made(places: Sequence[str]) -> Path:
    """A new folder at the first place that has room for Ray's sockets."""
    refused = {}
    for place in dict.fromkeys(places):
        if sys.platform == "win32":  # no sockets there
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError as error:
            refused[place] = f"cannot be written ({error.strerror or error})"
            continue
        reason = _too_long(folder)
        if reason is None:
            return folder
        refused[place] = reason
        with suppress(OSError):
            folder.rmdir()
    listed = "; ".join(f"{place} {reason}" for place, reason in refused.items())
    raise OSError(
        f"Ray has no folder for its sockets: {listed}. Name a short one that can be written: RAY_TMPDIR=FOLDER (or "
        "TMPDIR=FOLDER), or run without Ray: --serial"
    )


def _too_long(folder: Path) -> str | None:
    length = len(os.fsencode(folder))
    if sys.platform != "win32" and length > LONGEST:
        return f"is too long ({length} bytes, {LONGEST} at most)"
    return None
