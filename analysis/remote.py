"""Results kept in an object store: fetched to a folder of this machine, and what was drawn sent back.

Only files that are new or changed travel, so drawing again after a few more trials moves those trials alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ablations.records import names
from ablations.records.files import atomic, cache_home, locked
from ablations.records.parquet import read_parquet
from ablations.records.storage import Entry, Storage, StoreError, open_storage
from analysis.frame import AnalysisError

_WHOLE = (names.RESULTS, names.RUN, names.PROFILE)
_FOLDERS = (names.SAMPLES, names.IMAGES, names.TRIALS)
_DRAWN = (names.FIGURES, names.TABLES)
_THREADS = 16  # most of the time is spent waiting


@dataclass(frozen=True)
class Place:
    """An output folder in an object store."""

    storage: Storage

    @property
    def uri(self) -> str:
        return self.storage.location

    def fetch(self, folder: Path) -> Path:
        """Copy what the analysis reads into a folder, and return it."""
        try:
            found = self._listed("")
            wanted = {name: entry for name, entry in found.items() if name in _WHOLE}
            wanted |= self._listed(names.SAMPLES)
            if names.RESULTS in found:
                rows = read_parquet(self.storage, names.RESULTS, columns=["key"])
                of_rows = set(map(names.images_file, rows["key"].to_pylist()))
                wanted |= {name: entry for name, entry in self._listed(names.IMAGES).items() if name in of_rows}
            else:  # stopped before it compacted
                trials = self._listed(names.TRIALS)
                if not trials:
                    raise AnalysisError(
                        f"{self.uri} holds neither {names.RESULTS} nor {names.TRIALS}: run the experiments first: "
                        f"make ablations OUT={self.uri}"
                    )
                wanted |= trials | self._listed(names.IMAGES)
            self._copy(wanted, folder)
            _forget(folder, but=wanted.keys())
        except (OSError, pa.ArrowException) as error:
            raise AnalysisError(f"{self.uri} cannot be read ({str(error)[:200]})") from error
        return folder

    def fetch_recommendation(self, folder: Path) -> Path:
        """Copy what the page of a search reads into a folder of its own, and return it; what an earlier page drew
        there goes.
        """
        for name in _DRAWN:
            shutil.rmtree(folder / name, ignore_errors=True)
        try:
            top = {name: entry for name, entry in self._listed("").items() if name == names.RECOMMENDATION}
            if not top:
                (folder / names.RECOMMENDATION).unlink(missing_ok=True)
                raise AnalysisError(
                    f"{self.storage.below(names.RECOMMENDATION)} is not there: `sievit recommend --out {self.uri}` "
                    "makes it"
                )
            self._copy(top, folder)
            images = self._listed(f"{names.CANDIDATES}/{names.IMAGES}")
            drawn = {f"{names.CANDIDATES}/{names.images_file(key)}" for key in _keys_drawn(folder)}
            wanted = {name: entry for name, entry in images.items() if name in drawn}
            self._copy(wanted | self._listed(f"{names.CANDIDATES}/{names.SAMPLES}"), folder)
        except (OSError, pa.ArrowException) as error:
            raise AnalysisError(f"{self.uri} cannot be read ({str(error)[:200]})") from error
        return folder

    def send(self, folder: Path, page: str = names.REPORT) -> str:
        """Copy what was drawn back; the URI of the page."""
        files = [path for name in _DRAWN for path in sorted((folder / name).glob("*")) if path.is_file()]
        try:
            self.storage.make(*_DRAWN)
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(lambda path: self._send_one(path, folder), [*files, folder / page]))
        except OSError as error:
            raise AnalysisError(
                f"{page} is in {folder}, but cannot be written to {self.uri} ({str(error)[:200]})"
            ) from error
        return self.storage.below(page)

    def _listed(self, folder: str) -> dict[str, Entry]:
        prefix = f"{folder}/" if folder else ""
        return {f"{prefix}{name}": entry for name, entry in self.storage.entries(folder).items()}

    def _copy(self, wanted: Mapping[str, Entry], folder: Path) -> None:
        new = [name for name, entry in wanted.items() if not _same(folder / name, entry)]
        for parent in {(folder / name).parent for name in new} | {folder}:
            parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda name: self._copy_one(name, wanted[name], folder), new))

    def _copy_one(self, name: str, entry: Entry, folder: Path) -> None:
        with atomic(folder / name, lasting=False) as partial:
            partial.write_bytes(self.storage.read(name))
            if entry.modified:
                os.utime(partial, ns=(entry.modified, entry.modified))

    def _send_one(self, path: Path, folder: Path) -> None:
        self.storage.write(path.relative_to(folder).as_posix(), path.read_bytes())


def _keys_drawn(folder: Path) -> Iterator[str]:
    """The trials whose images the page of a search draws; none where its record is damaged, which who draws it says."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        for goal in json.loads((folder / names.RECOMMENDATION).read_text(encoding="utf-8"))["goals"]:
            yield from (str(goal[entry]["key"]) for entry in ("recommended", "comparator"))


def open_place(uri: str) -> Place:
    """The place of a URI, opened as the run opens it."""
    try:
        return Place(open_storage(uri))
    except StoreError as error:
        raise AnalysisError(str(error)) from error


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """Where the copy of a place is kept on this machine, for one report at a time."""
    folder = cache_home() / "analysis" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock", what=f"a report of {uri}"))
        except OSError as error:
            raise AnalysisError(
                f"no copy of {uri} can be kept here ({error}); name a folder: SIEVIT_CACHE=FOLDER"
            ) from error
        yield folder


def _forget(folder: Path, *, but: Collection[str]) -> None:
    """Remove what is no longer there from the copy, and what an earlier report drew of it."""
    for name in _DRAWN:
        shutil.rmtree(folder / name, ignore_errors=True)
    copied = [folder / name for name in _WHOLE]
    copied += [path for name in _FOLDERS for path in (folder / name).glob("[!.]*")]
    for path in copied:
        if path.relative_to(folder).as_posix() not in but:
            path.unlink(missing_ok=True)


def _same(path: Path, entry: Entry) -> bool:
    """The copy is of this size and time."""
    try:
        about = path.stat()
    except OSError:
        return False
    return bool(entry.modified) and (about.st_size, about.st_mtime_ns) == (entry.size, entry.modified)
