"""All rows of a store as one table, without opening every file each time.

The truth is one file a trial. What was read of them is remembered in ``cache/index``: segments that are appended and
never changed, each holding rows together with the size and time of the files they came from. A file whose size and time
are still those is not opened again; every other one is. So twenty thousand finished trials are listed and known within
a second, and deleting the index costs nothing but the time to read them all once more.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ablations.records.names import CACHE, IMAGES, KEY, SUFFIX, TRIALS, images_file, row_file
from ablations.records.parquet import AT_ONCE, owner, parquet, read_parquet, read_row, read_together, short
from ablations.records.schema import ROW_SCHEMA, images_as_known
from ablations.records.storage import Entry, Storage

log = logging.getLogger(__name__)

FOLDER = f"{CACHE}/index"
_OWN = [
    (name, pa.int64()) for name in ("row_size", "row_modified", "images_size", "images_modified", "images_verified")
]
INDEX_SCHEMA = pa.schema([*ROW_SCHEMA, *_OWN])
"""A row, its file as it was when read, its file of images as it was when found whole (-1: not), and whether every byte
of that was read then (1), or only its end, which tells whose it is and how many rows it has (0).
"""

_WORTH_KEEPING = 256  # rows read anew from which a reader appends a segment
_SEGMENTS = 32  # from which the run that holds the place joins them
_THREADS = 16  # most of the time is spent waiting for storage


class RowIndex:
    """The rows of the trials in a storage, as they are when asked."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._table: pa.Table | None = None
        self._unsaved: set[str] = set()
        self._damaged: dict[str, Entry] = {}
        self._incomplete: set[str] = set()  # those that were warned of
        self._spoilt: dict[str, Entry] = {}  # files of images that are not whole, as they were when that was found

    def table(self, *, verify: bool = False) -> pa.Table:
        """Every readable row, by key; files that cannot be read are left out with a warning.

        ``verify``: files of images that were not yet verified to the last byte are now.
        """
        known = self._segments() if self._table is None else self._table
        listed = self._listed(TRIALS)
        current = self._current(known, listed)
        if len(current) < known.num_rows:
            known = known.take(pa.array(sorted(current.values()), pa.int64()))
        unread = [key for key in sorted(listed) if key not in current and self._damaged.get(key) != listed[key]]
        fresh = [self._read(unread[start : start + AT_ONCE], listed) for start in range(0, len(unread), AT_ONCE)]
        if fresh:
            known = pa.concat_tables([known, *fresh]).combine_chunks()
            known = known.take(pc.sort_indices(known["key"]))
        self._table = self._with_images(known, verify=verify)
        if len(self._unsaved) >= _WORTH_KEEPING:
            self.save()
        return self._table

    def finished(self, table: pa.Table | None = None, *, verify: bool = False) -> set[str]:
        """Keys with status "ok" and a whole file of images."""
        rows = self.table(verify=verify) if table is None else table
        whole = pc.and_(pc.equal(rows["status"], "ok"), pc.greater_equal(rows["images_size"], 0))
        return set(rows["key"].filter(whole).to_pylist())

    def save(self, *, alone: bool = False) -> None:
        """Append what was read since the last time. ``alone``: no one else writes here,
        so many segments may be joined.
        """
        if self._table is None or not (self._unsaved or alone):
            return
        with suppress(OSError):  # somebody else's folder, or no space: the next reader reads again
            self._storage.make(FOLDER)
            segments = [f"{FOLDER}/{name}" for name in self._storage.entries(FOLDER) if name.endswith(SUFFIX)]
            if alone and len(segments) >= _SEGMENTS:
                self._append(self._table)
                for name in segments:
                    self._storage.delete(name)
            elif self._unsaved:
                mask = pc.is_in(self._table["key"], pa.array(sorted(self._unsaved), pa.string()))
                self._append(self._table.filter(mask))
            self._unsaved.clear()

    def _append(self, rows: pa.Table) -> None:
        self._storage.write(f"{FOLDER}/{uuid.uuid4().hex}{SUFFIX}", parquet(rows))

    def _segments(self) -> pa.Table:
        tables = [INDEX_SCHEMA.empty_table()]
        for name in sorted(self._storage.entries(FOLDER)):
            if name.endswith(SUFFIX):
                try:
                    table = read_parquet(self._storage, f"{FOLDER}/{name}")
                except (OSError, pa.ArrowException) as error:
                    log.debug("%s cannot be read (%s)", name, error)
                    continue
                if table.schema.names == INDEX_SCHEMA.names:  # else of another version: its files are read again
                    tables.append(table.cast(INDEX_SCHEMA))
        known = pa.concat_tables(tables).combine_chunks()
        return known.take(pc.sort_indices(known["key"]))

    def _listed(self, folder: str) -> dict[str, Entry]:
        """The entries of a folder by key; what is no result is named once."""
        found: dict[str, Entry] = {}
        for name, entry in self._storage.entries(folder).items():
            stem = name.removesuffix(SUFFIX)
            if stem != name and KEY.fullmatch(stem):
                found[stem] = entry
            elif stem != name and self._damaged.setdefault(name, entry) is entry:
                log.warning("%s/%s is no result of this suite and is ignored", folder, name)
        return found

    def _current(self, known: pa.Table, listed: Mapping[str, Entry]) -> dict[str, int]:
        """Key -> position of the rows whose file is still the one that was read; of several one with verified images,
        for the order of segments says nothing.
        """
        columns = (known[name].to_pylist() for name in ("key", "row_size", "row_modified", "images_verified"))
        found: dict[str, int] = {}
        best: dict[str, int] = {}
        for position, (key, size, modified, verified) in enumerate(zip(*columns, strict=True)):
            entry = listed.get(key)
            if entry is not None and (entry.size, entry.modified) == (size, modified) and verified >= best.get(key, 0):
                found[key], best[key] = position, verified
        return found

    def _read(self, keys: Sequence[str], listed: Mapping[str, Entry]) -> pa.Table:
        """The rows of these files: all at once, or one by one where some file among them is damaged."""
        rows = self._read_together(keys)
        if rows is None:
            with ThreadPoolExecutor(_THREADS) as threads:
                each = list(threads.map(self._read_one, keys))
            for key, row in zip(keys, each, strict=True):
                if row is None:
                    self._damaged[key] = listed[key]
            rows = pa.concat_tables([ROW_SCHEMA.empty_table(), *(row for row in each if row is not None)])
            rows = rows.combine_chunks()
        read = rows["key"].to_pylist()
        self._unsaved.update(read)
        entries = [listed[key] for key in read]
        none, zero = [-1] * len(read), [0] * len(read)
        numbers = ([e.size for e in entries], [e.modified for e in entries], none, none, zero)
        for (name, kind), values in zip(_OWN, numbers, strict=True):
            rows = rows.append_column(pa.field(name, kind), pa.array(values, kind))
        return rows

    def _read_together(self, keys: Sequence[str]) -> pa.Table | None:
        paths, filesystem = self._storage.dataset([row_file(key) for key in keys])
        try:
            found = read_together(paths, schema=ROW_SCHEMA, filesystem=filesystem)
        except (OSError, ValueError, pa.ArrowException):
            return None
        right = found["key"].to_pylist() == list(keys) and set(found["status"].to_pylist()) <= {"ok", "failed"}
        return found if right else None

    def _read_one(self, key: str) -> pa.Table | None:
        name = row_file(key)
        try:
            return read_row(self._storage, key)
        except FileNotFoundError:
            return None  # gone since it was listed
        except (OSError, ValueError, pa.ArrowException) as error:
            place = f"{self._storage.location}/{name}"
            log.warning("%s cannot be read and its trial will be computed again (%s)", place, short(error))
            return None

    def _with_images(self, rows: pa.Table, *, verify: bool) -> pa.Table:
        """The same rows, those files of images looked at that are not the ones that were found whole."""
        images = self._listed(IMAGES)
        names = ("key", "status", "images", "images_size", "images_modified", "images_verified")
        columns = dict(zip(names, (rows[name].to_pylist() for name in names), strict=True))
        sizes, times, verified = (columns[name] for name in names[3:])
        changed: list[int] = []
        for place, (key, status) in enumerate(zip(columns["key"], columns["status"], strict=True)):
            entry = images.get(key)
            known = entry is not None and (
                (entry.size, entry.modified) == (sizes[place], times[place]) or entry == self._spoilt.get(key)
            )
            if status == "ok" and not (known and (verified[place] or not verify)):
                changed.append(place)
        if not changed:
            return rows
        keys = [columns["key"][place] for place in changed]
        look = self._read_images if verify else self._count_images
        with ThreadPoolExecutor(_THREADS) as threads:
            counts = list(threads.map(lambda key: look(key) if key in images else None, keys))
        for place, key, count in zip(changed, keys, counts, strict=True):
            whole = count is not None and count == columns["images"][place]
            if not whole and key in images:
                self._spoilt[key] = images[key]
            if whole or sizes[place] >= 0:
                self._unsaved.add(key)
            if not whole and key not in self._incomplete:
                self._incomplete.add(key)
                where = f"{self._storage.location}/{images_file(key)}"
                log.warning("%s is missing or not whole: its trial will be computed again", where)
            sizes[place], times[place] = (images[key].size, images[key].modified) if whole else (-1, -1)
            verified[place] = int(whole and verify)
        for name, values in zip(names[3:], (sizes, times, verified), strict=True):
            rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values, pa.int64()))
        return rows

    def _count_images(self, key: str) -> int | None:
        """How many rows a file of images has, by its end; None where that is damaged, or of another trial."""
        try:
            with self._storage.open(images_file(key)) as file:
                about = pq.read_metadata(file)
            return int(about.num_rows) if owner(about.metadata) in (key, None) else None
        except (OSError, ValueError, pa.ArrowException):
            return None

    def _read_images(self, key: str) -> int | None:
        """The same, and every byte of it is what was written."""
        try:
            found = read_parquet(self._storage, images_file(key))
            return int(images_as_known(found).num_rows) if owner(found.schema.metadata) in (key, None) else None
        except (OSError, ValueError, pa.ArrowException):
            return None

    @property
    def spoilt(self) -> list[str]:
        """Keys of the files of images that were found not to be whole."""
        return sorted(self._spoilt)
