"""Where results live: one small Parquet file a trial, each written once and atomically.

``OUT/trials/<key>.parquet`` is the truth and its presence means *finished*; it is written last, after the trial's
``OUT/images/<key>.parquet``, so that whatever ends a run at whatever moment leaves only whole results behind.
``OUT/results.parquet`` is compacted from them and can be made again at any time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ablations.files import atomic
from ablations.trial import Trial, TrialResult

log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{16}")
_LEFT_OVER = 3600.0  # seconds after which a temporary file can only be one that a killed run left behind

_TEXT, _REAL, _WHOLE, _FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()
ROW_SCHEMA = pa.schema(
    [
        ("spec", _TEXT), ("key", _TEXT), ("status", _TEXT), ("error", _TEXT), ("model", _TEXT), ("params_m", _REAL),
        ("weights", _TEXT), ("workload", _TEXT), ("images", _WHOLE), ("batch", _WHOLE), ("seed", _WHOLE),
        ("finetuned", _FLAG), ("training", _TEXT), ("epochs", _WHOLE), ("train_images", _WHOLE),
        ("train_seconds", _REAL), ("teacher", _FLAG), ("placement", _TEXT), ("blocks", pa.list_(_WHOLE)),
        ("reducer", _TEXT), ("variant", _TEXT), ("x", _REAL), ("score", _TEXT), ("budget", _TEXT), ("target", _REAL),
        ("target_gmacs", _REAL), ("target_reached", _FLAG), ("target_note", _TEXT), ("calibrated", _FLAG),
        ("calibration_gmacs", _REAL), ("calibration_images", _WHOLE), ("probes", _WHOLE), ("top1", _REAL),
        ("top1_low", _REAL), ("top1_high", _REAL), ("top5", _REAL), ("agreement", _REAL), ("gmacs_mean", _REAL),
        ("gmacs_std", _REAL), ("reference_gmacs_mean", _REAL), ("reducer_gmacs_mean", _REAL), ("dense_gmacs", _REAL),
        ("tokens", pa.list_(_REAL)), ("tokens_std", pa.list_(_REAL)), ("coverage", _REAL), ("class_kept", _REAL),
        ("images_per_second", _REAL), ("dense_images_per_second", _REAL), ("speedup", _REAL), ("speedup_low", _REAL),
        ("speedup_high", _REAL), ("measured_batch", _WHOLE), ("peak_memory_mb", _REAL), ("shared_prefix", _FLAG),
        ("seconds", _REAL), ("device", _TEXT), ("versions", _TEXT), ("data_digest", _TEXT),
        ("weights_digest", _TEXT), ("dense_top1", _REAL), ("created", _TEXT),
    ]
)  # fmt: skip
"""The columns of ``results.parquet``, in order."""

IMAGE_SCHEMA = pa.schema(
    [
        ("image", _TEXT), ("label", _WHOLE), ("prediction", _WHOLE), ("correct", _FLAG), ("dense_correct", _FLAG),
        ("loss", _REAL), ("gmacs", _REAL), ("tokens", pa.list_(_WHOLE)), ("kept", pa.list_(pa.binary())),
        ("class_kept", _FLAG), ("coverage", _REAL), ("clutter", _WHOLE),
    ]
)  # fmt: skip
"""The columns of ``images/<key>.parquet``; ``kept`` holds one ``np.packbits`` of the patches a block."""


class StoreError(OSError):
    """The results cannot be kept where they should go."""


@dataclass(frozen=True)
class Status:
    """How far a spec is."""

    spec: str
    planned: int
    finished: int
    failed: int
    stale: int  # on disk, but no longer part of the plan: another model, other data, an older spec


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, in UTF-8 and readable by a person."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON of a file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


class Store:
    """The result files below one folder."""

    def __init__(self, out: Path | str) -> None:
        self.out = Path(out).absolute()

    @property
    def trials(self) -> Path:
        return self.out / "trials"

    @property
    def images(self) -> Path:
        return self.out / "images"

    @property
    def samples(self) -> Path:
        return self.out / "samples"

    @property
    def cache(self) -> Path:
        return self.out / "cache"

    @property
    def results(self) -> Path:
        return self.out / "results.parquet"

    @property
    def untimed(self) -> Store:
        """Where the results of trials that are still to be timed wait, evaluated and out of the way."""
        return Store(self.cache / "untimed")

    def create(self) -> Store:
        """Make the folders and prove that files can be written there; a run must not find out at its end."""
        try:
            for folder in (self.out, self.trials, self.images, self.samples, self.cache):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"writable")
        except OSError as error:
            raise StoreError(
                f"the results cannot be written to {self.out} ({error.strerror or error}); "
                "choose another folder with --out, or make this one writable"
            ) from error
        self._remove_left_overs()
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run out of this folder; the lock ends with the process, however it ends."""
        with (self.out / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"another run is writing to {self.out}; wait for it to end, or choose another folder with --out"
                ) from error
            except OSError as error:  # some network disks know no locks: two runs there only do work twice
                log.debug("%s cannot be locked (%s)", self.out, error)
            yield

    def save(self, result: TrialResult) -> None:
        """Keep a result: its images first, then the row whose presence says that the trial is finished."""
        if result.ok:
            self._write(self._path(self.images, result.key), pa.Table.from_pydict(_columns(result), IMAGE_SCHEMA))
        self._write(self._path(self.trials, result.key), pa.Table.from_pylist([result.row], ROW_SCHEMA))

    def keep(self, result: TrialResult, trial: Trial) -> None:
        """Save a result; one that is evaluated but still to be timed is put aside until ``release``."""
        if not (result.ok and trial.measure):
            self.save(result)
            return
        for folder in (self.untimed.trials, self.untimed.images):
            folder.mkdir(parents=True, exist_ok=True)
        self.untimed.save(result)

    def release(self, key: str, columns: Mapping[str, Any]) -> None:
        """Save a result that was put aside, with the columns that timing it gave."""
        aside = self.untimed
        row = aside.load(key)
        if row is None:
            raise StoreError(f"the evaluation of {key} is no longer in {aside.out}; run the same command again")
        self._path(aside.images, key).replace(self._path(self.images, key))
        self._write(self._path(self.trials, key), pa.Table.from_pylist([{**row, **columns}], ROW_SCHEMA))
        self._path(aside.trials, key).unlink(missing_ok=True)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The row of every trial on disk, by key; files that cannot be read are ignored with a warning."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.trials.glob("*.parquet")):
            row = self._read_row(path)
            if row is not None:
                found[path.stem] = row
        return found

    def finished(self) -> set[str]:
        """Keys that need not be computed again: a readable row with status "ok" and a whole image file beside it."""
        return {key for key, row in self.rows().items() if row["status"] == "ok" and self._has_images(key, row)}

    def load(self, key: str) -> dict[str, Any] | None:
        """One row, or None."""
        path = self._path(self.trials, key)
        return self._read_row(path) if path.exists() else None

    def compact(self, plan: Collection[str]) -> int:
        """Write ``results.parquet`` from the planned trials that are on disk; how many they are.

        Rows of earlier plans stay in ``trials/`` but are left out here, so that no figure mixes two models.
        """
        rows = self.rows()
        kept = [rows[key] for key in dict.fromkeys(plan) if key in rows]
        self._write(self.results, pa.Table.from_pylist(kept, ROW_SCHEMA))
        return len(kept)

    def status(self, plan: Mapping[str, Collection[str]]) -> list[Status]:
        """How far each spec is; ``plan`` maps a spec to the keys of its trials."""
        rows, finished = self.rows(), self.finished()
        stale: dict[str, int] = {}
        planned = {key for keys in plan.values() for key in keys}
        for key, row in rows.items():
            if key not in planned:
                stale[row["spec"]] = stale.get(row["spec"], 0) + 1
        failed = {key for key, row in rows.items() if row["status"] == "failed"}
        return [
            Status(name, len(keys), len(finished & set(keys)), len(failed & set(keys)), stale.get(name, 0))
            for name, keys in {**plan, **{name: () for name in sorted(stale) if name not in plan}}.items()
        ]

    def _path(self, folder: Path, key: str) -> Path:
        """A file below OUT and nowhere else: keys are 16 hexadecimal digits."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no trial key (16 hexadecimal digits)")
        return folder / f"{key}.parquet"

    def _write(self, path: Path, table: pa.Table) -> None:
        with atomic(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _read_row(self, path: Path) -> dict[str, Any] | None:
        if not _KEY.fullmatch(path.stem):
            log.warning("%s is no result of this suite and is ignored", path)
            return None
        try:
            rows = _as_known(pq.read_table(path, partitioning=None)).to_pylist()
            if len(rows) != 1 or rows[0]["key"] != path.stem or rows[0]["status"] not in ("ok", "failed"):
                raise ValueError("its content does not match its name")
        except (OSError, ValueError, pa.ArrowException) as error:
            log.warning("%s cannot be read and its trial will be computed again (%s)", path, _short(error))
            return None
        row: dict[str, Any] = rows[0]
        return row

    def _has_images(self, key: str, row: Mapping[str, Any]) -> bool:
        path = self._path(self.images, key)
        try:
            whole = pq.read_metadata(path).num_rows == row["images"]
        except (OSError, pa.ArrowException):
            whole = False
        if not whole:
            log.warning("%s is missing or not whole: its trial will be computed again", path)
        return bool(whole)

    def _remove_left_overs(self) -> None:
        for folder in (self.out, self.trials, self.images, self.samples, self.cache):
            for path in folder.glob(".*.tmp"):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _LEFT_OVER:
                        path.unlink()


def _as_known(table: pa.Table) -> pa.Table:
    """A row as this version knows it: columns that were added since it was written are null."""
    for column in ROW_SCHEMA:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def _columns(result: TrialResult) -> dict[str, Any]:
    """The per-image columns as Arrow takes them: a column that is not known for this workload is all null."""
    count = len(result.images["image"])
    given = {name: result.images.get(name) for name in IMAGE_SCHEMA.names}
    return {
        name: [None] * count if values is None else values.tolist() if hasattr(values, "tolist") else values
        for name, values in given.items()
    }


def _short(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
