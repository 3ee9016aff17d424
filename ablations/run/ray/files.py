"""Files of the driver on the nodes of a cluster: used where they are if the node sees them, else fetched once a node.

What a trial reads is decoded images, predictions and weights: few files, some of gigabytes. They are read as memory
maps that all workers of a node share, so they belong on the node's disk, under the digest of their content: a later
run, or another one, finds them there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ablations.records.files import atomic, cache_home, locked

log = logging.getLogger(__name__)

_PART = 32 * 2**20  # bytes that travel at once: what a transfer needs of the object store
_PATIENCE = 600.0  # seconds for one part


class FetchError(OSError):
    """A file of the driver cannot be had on this node."""


@dataclass(frozen=True)
class Listed:
    """A file as the driver has it."""

    size: int  # bytes
    modified: int  # nanoseconds: on a shared disk the same for every node
    sha256: str


def listed(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size, time and digest of each file, as plain data."""
    found = {}
    for path in dict.fromkeys(paths):
        about = path.stat()
        found[str(path)] = asdict(Listed(about.st_size, about.st_mtime_ns, _digest(path, about.st_mtime_ns)))
    return found


@cache
def _digest(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Library:
    """Hands out the listed files, and no others, part by part. Runs beside the driver."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self._begun: dict[str, int] = {}

    def read(self, path: str, start: int) -> bytes:
        """The part of a file that begins at a byte; empty behind its end."""
        if path not in self._paths:
            raise PermissionError(f"{path} is no file of this run")
        if start == 0:
            self._begun[path] = self._begun.get(path, 0) + 1
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(_PART)

    def fetched(self) -> dict[str, int]:
        """How often each file was asked for."""
        return dict(self._begun)


def open_library(paths: Iterable[str]) -> Any:
    """Start handing out files from this node; the handle to give to workers. It ends with the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Library).options(num_cpus=0, scheduling_strategy=here, max_concurrency=8).remote(tuple(paths))


class Files:
    """Where a file of the driver is on this node. Called with its path there; fetches what is not visible here.

    What an earlier run fetched is verified once in each ``run`` (its id).
    """

    def __init__(self, known: Mapping[str, Mapping[str, Any]], library: Any, *, run: str, always: bool = False) -> None:
        self._known = {path: Listed(**about) for path, about in known.items()}
        self._library, self._run, self._always = library, run, always

    def __call__(self, path: Path) -> Path:
        about = self._known.get(str(path))
        if about is None or (not self._always and _is_here(path, about)):
            return path
        folder = cache_home() / "fetched"
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"{about.sha256[:32]}{path.suffix}"
        lock = kept.with_suffix(".lock")
        with locked(lock, what=f"fetching {path.name}"):
            if not self._is_good(kept, about, verified=lock.read_text(encoding="utf-8")):
                self._fetch(path, about, kept)
            lock.write_text(self._run, encoding="utf-8")
        return kept

    def _is_good(self, kept: Path, about: Listed, *, verified: str) -> bool:
        if not (kept.exists() and kept.stat().st_size == about.size):
            return False
        return verified == self._run or _digest(kept, kept.stat().st_mtime_ns) == about.sha256

    def _fetch(self, path: Path, about: Listed, kept: Path) -> None:
        log.info("fetching %s (%.0f MB)", path.name, about.size / 1e6)
        digest = hashlib.sha256()
        with atomic(kept) as temporary, temporary.open("wb") as file:
            while file.tell() < about.size:
                part = ray.get(self._library.read.remote(str(path), file.tell()), timeout=_PATIENCE)
                if not part:
                    break
                digest.update(part)
                file.write(part)
            file.flush()
            if digest.hexdigest() != about.sha256:
                raise FetchError(f"{path.name} changed while it was fetched; run the same command again")


def _is_here(path: Path, about: Listed) -> bool:
    """The node sees the driver's own file: same size, same time to the nanosecond."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == about.size and found.st_mtime_ns == about.modified
