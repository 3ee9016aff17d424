"""Where results live: one small Parquet file a trial, each written once and whole.

``OUT/trials/<key>.parquet`` is the truth and its presence means *finished*; it is written last, after the trial's
``OUT/images/<key>.parquet``, so that whatever ends a run at whatever moment leaves only whole results behind.
``OUT/results.parquet`` is compacted from them and can be made again at any time. OUT is a folder, or a URI that pyarrow
knows (``storage``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from ablations.records.files import cache_home, json_bytes
from ablations.records.locks import lock
from ablations.records.names import CACHE, IMAGES, KEY, RESULTS, SAMPLES, TRIALS, images_file, row_file
from ablations.records.parquet import owned, parquet, read_parquet, read_row, short
from ablations.records.schema import IMAGE_SCHEMA, ROW_SCHEMA, images_as_known
from ablations.records.storage import Disk, StoreError, open_storage, refused
from ablations.store.index import RowIndex
from ablations.store.lease import leased
from ablations.store.trial_log import add_line, read_log, trial_log
from ablations.trial.trial import Trial, TrialResult

log = logging.getLogger(__name__)

_UNTIMED = f"{CACHE}/untimed"


@dataclass(frozen=True)
class Status:
    """How far a spec is."""

    spec: str
    planned: int
    finished: int
    failed: int
    stale: int  # on disk, but no longer part of the plan: another model, other data, an older spec, older code


class Store:
    """The result files below one folder or URI."""

    def __init__(self, out: Path | str) -> None:
        self.storage = open_storage(out)
        self._index = RowIndex(self.storage)

    @property
    def location(self) -> str:
        """OUT as a person writes it and as another process opens it."""
        return self.storage.location

    @property
    def remote(self) -> bool:
        """Results go to a file system that is not a folder of this machine."""
        return not isinstance(self.storage, Disk)

    @property
    def out(self) -> Path:
        """The folder of what is no result (caches, scratch): OUT itself, or for a URI a folder of this machine."""
        if isinstance(self.storage, Disk):
            return self.storage.root
        return cache_home() / hashlib.sha256(self.location.encode()).hexdigest()[:16]

    @property
    def cache(self) -> Path:
        return self.out / CACHE

    @property
    def results(self) -> str:
        """Where the compacted rows are."""
        return self.storage.below(RESULTS)

    @property
    def untimed(self) -> Store:
        """Where the results of trials that are still to be timed wait, evaluated and out of the way."""
        return Store(self.storage.below(_UNTIMED))

    def create(self) -> Store:
        """Make the folders and prove that files can be written there; a run must not find out at its end."""
        folders = (TRIALS, IMAGES, SAMPLES, CACHE)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            self.storage.make("", *folders)
            probed = [self._probe(folder) for folder in ((CACHE,) if self.remote else ("", *folders))]
        except OSError as error:
            raise refused(self.location, error) from error
        if isinstance(self.storage, Disk):
            self.storage.remove_left_overs(("", *folders), now=max(probed))
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run out; the lock ends with the process, however it ends."""
        if isinstance(self.storage, Disk):
            with (self.out / ".lock").open("a") as file:
                try:
                    _lock(file)
                except BlockingIOError as error:
                    raise StoreError(
                        f"another run is writing to {self.out}; wait for it to end, or choose another folder with --out"
                    ) from error
                except OSError as error:  # some network disks know no locks
                    log.debug("%s cannot be locked (%s)", self.out, error)
                else:
                    yield
                    return
        with leased(self.storage):
            yield

    def save(self, result: TrialResult) -> None:
        """Keep a result: its images first, then the row whose presence says that the trial is finished.

        Raises:
            StoreError: it could not be written, e.g. because the disk is full; nothing that counts was left.
        """
        key = _checked(result.key)
        try:
            if result.ok:
                images = pa.Table.from_pydict(_columns(result), IMAGE_SCHEMA)
                self.storage.write(images_file(key), parquet(owned(images, key)))
            self.storage.write(row_file(key), _row(result.row))
        except OSError as error:
            raise refused(self.location, error) from error

    def keep(self, result: TrialResult, trial: Trial) -> None:
        """Save a result; one that is evaluated but still to be timed is put aside until ``release``."""
        if not (result.ok and trial.measure):
            self.save(result)
            return
        aside = self.untimed
        aside.storage.make(TRIALS, IMAGES)
        aside.save(result)

    def release(self, key: str, columns: Mapping[str, Any]) -> None:
        """Save a result that was put aside, with the columns that timing it gave."""
        aside, images = self.untimed, images_file(_checked(key))
        row = aside.load(key)
        if row is None:
            raise StoreError(f"the evaluation of {key} is no longer in {aside.location}; run the same command again")
        try:
            if aside.storage.entry(images) is not None:  # else an earlier try has moved it already
                self.storage.move(f"{_UNTIMED}/{images}", images)
            self.storage.write(row_file(key), _row({**row, **columns}))
        except OSError as error:
            raise refused(self.location, error) from error
        aside.storage.delete(row_file(key))

    def table(self) -> pa.Table:
        """Every row that can be read, by key, with the columns of ``schema.ROW_SCHEMA``."""
        return self.indexed().select(ROW_SCHEMA.names)

    def indexed(self) -> pa.Table:
        """The same with the columns of ``index.INDEX_SCHEMA``: what is known of the files."""
        return self._index.table()

    def rows(self) -> dict[str, dict[str, Any]]:
        """The row of every trial on disk, by key; files that cannot be read are ignored with a warning."""
        return {row["key"]: row for row in self.table().to_pylist()}

    def finished(self, *, verify: bool = False) -> set[str]:
        """Keys that need not be computed again: a readable row with status "ok" and a whole image file beside it.

        ``verify``: the checksums of image files are looked at as well, once for each; else only how they end.
        """
        return self._index.finished(verify=verify)

    def forget_spoilt(self) -> None:
        """Delete the rows whose files of images were found spoilt: whoever computes them again starts from nothing."""
        for key in self._index.spoilt:
            self.storage.delete(row_file(_checked(key)))

    def load(self, key: str) -> dict[str, Any] | None:
        """One row, or None."""
        _checked(key)
        try:
            row: dict[str, Any] = read_row(self.storage, key).to_pylist()[0]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, pa.ArrowException) as error:
            log.warning("%s/%s cannot be read and its trial will be computed again (%s)",
                        self.location, row_file(key), short(error))  # fmt: skip
            return None
        return row

    def load_images(self, key: str) -> pa.Table:
        """The table of a trial's images; OSError, ValueError or ArrowException where it cannot be read."""
        return images_as_known(read_parquet(self.storage, images_file(_checked(key))))

    def compact(self, plan: Collection[str]) -> int:
        """Write ``results.parquet`` from the planned trials that are on disk; how many they are.

        Rows of earlier plans stay in ``trials/`` but are left out here, so that no figure mixes two models.
        """
        table = self.table()
        place = {key: position for position, key in enumerate(table["key"].to_pylist())}
        kept = [place[key] for key in dict.fromkeys(plan) if key in place]
        try:
            self.storage.write(RESULTS, parquet(table.take(pa.array(kept, pa.int64()))))
        except OSError as error:
            raise refused(self.location, error) from error
        self._index.save(alone=True)
        return len(kept)

    def status(self, plan: Mapping[str, Collection[str]], rows: pa.Table | None = None) -> list[Status]:
        """How far each spec is; ``plan`` maps a spec to the keys of its trials, ``rows`` are ``indexed()``."""
        table = self.indexed() if rows is None else rows
        finished = self._index.finished(table)
        failed = set(table["key"].filter(pc.equal(table["status"], "failed")).to_pylist())
        planned = {key for keys in plan.values() for key in keys}
        stale: dict[str, int] = {}
        for key, spec in zip(table["key"].to_pylist(), table["spec"].to_pylist(), strict=True):
            if key not in planned:
                stale[spec] = stale.get(spec, 0) + 1
        return [
            Status(name, len(keys), len(finished & set(keys)), len(failed & set(keys)), stale.get(name, 0))
            for name, keys in {**plan, **{name: () for name in sorted(stale) if name not in plan}}.items()
        ]

    # --- other files --------------------------------------------------------------------------------------------------

    def write(self, name: str, content: bytes) -> None:
        """Put a file beside the results; its folder is one of theirs or made here."""
        try:
            if "/" in name:
                self.storage.make(name.rpartition("/")[0])
            self.storage.write(name, content)
        except OSError as error:
            raise refused(self.location, error) from error

    def delete(self, name: str) -> None:
        """Remove a file beside the results, if it is there."""
        self.storage.delete(name)

    def write_json(self, name: str, value: object) -> None:
        """Write JSON, in UTF-8 and readable by a person."""
        self.write(name, json_bytes(value))

    def read_json(self, name: str) -> Any:
        """The JSON of a file, or None where there is none that can be read."""
        try:
            return json.loads(self.storage.read(name))
        except (OSError, ValueError, RecursionError):
            return None

    def log(self, keys: Sequence[str]) -> AbstractContextManager[None]:
        """Keep what this thread logs meanwhile as the log of these trials."""
        return trial_log(self.storage, keys)

    def add_to_logs(self, keys: Sequence[str], text: str) -> None:
        """Add a line to the logs of these trials; where that fails, it is said and stops nothing."""
        add_line(self.storage, keys, text)

    def read_log(self, key: str) -> str | None:
        """What was logged while a trial was computed, all attempts; None where there is nothing."""
        return read_log(self.storage, key)

    def _probe(self, folder: str) -> float:
        """Prove that a file can be written to a folder; the time by the clock of its storage."""
        if isinstance(self.storage, Disk):
            with tempfile.TemporaryFile(dir=self.out / folder) as file:
                file.write(b"writable")
                file.flush()
                return os.fstat(file.fileno()).st_mtime
        self.storage.write(f"{folder}/writable", b"writable")
        return time.time()


def _lock(file: IO[str]) -> None:
    """Lock a file for this process alone. Whoever looks at a run holds the lock for a moment: that is waited for."""
    for _ in range(20):
        with suppress(BlockingIOError):
            return lock(file)
        time.sleep(0.025)
    return lock(file)


def _checked(key: str) -> str:
    """A key that names a file below OUT and nowhere else: keys are 16 hexadecimal digits."""
    if not KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no trial key (16 hexadecimal digits)")
    return key


def _row(row: Mapping[str, Any]) -> pa.Buffer:
    return parquet(pa.Table.from_pylist([dict(row)], ROW_SCHEMA))


def _columns(result: TrialResult) -> dict[str, Any]:
    """The per-image columns as Arrow takes them: a column that is not known for this workload is all null."""
    count = len(result.images["image"])
    given = {name: result.images.get(name) for name in IMAGE_SCHEMA.names}
    return {
        name: [None] * count if values is None else values.tolist() if hasattr(values, "tolist") else values
        for name, values in given.items()
    }
