"""The rows of a run from its Parquet files, those of older versions and of runs that were stopped included."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ablations.records.names import RESULTS, SUFFIX, TRIALS
from ablations.records.parquet import AT_ONCE, read_parquet, read_together
from ablations.records.storage import Disk

log = logging.getLogger(__name__)


def read_rows(out: Path, *, needed: Sequence[str]) -> pa.Table | None:
    """What a run compacted, or else the trials it left, one file each; None where there is neither. Columns that an
    older version lacks are null; those that are ``needed`` no version lacks. ArrowInvalid where a file is damaged.
    """
    if (out / RESULTS).is_file():
        return _read_one(Disk(out), RESULTS)
    folder = Disk(out / TRIALS)
    parts = sorted(path.name for path in folder.root.glob(f"*{SUFFIX}"))
    return _read_trials(folder, parts, needed) if parts else None


def read_left_rows(out: Path, keys: Collection[str], *, needed: Sequence[str]) -> pa.Table | None:
    """The rows of trials that a folder holds besides those of ``keys``; None where no such can be read."""
    folder = Disk(out / TRIALS)
    parts = sorted(path.name for path in folder.root.glob(f"*{SUFFIX}") if path.name.removesuffix(SUFFIX) not in keys)
    try:
        return _read_trials(folder, parts, needed) if parts else None
    except (OSError, pa.ArrowException) as error:
        log.warning("trials of earlier runs cannot be read (%s): the report does not name them", error)
        return None


def _read_trials(folder: Disk, names: list[str], needed: Sequence[str]) -> pa.Table:
    paths, _ = folder.dataset(names)
    known = pa.unify_schemas([pq.read_schema(path) for path in (paths[0], paths[-1])], promote_options="permissive")
    try:
        groups = [paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE)]
        table = pa.concat_tables([read_together(group, schema=known) for group in groups])
        if set(needed) <= set(table.column_names):
            return table
    except (OSError, pa.ArrowException) as error:
        log.debug("read one by one: %s", error)
    return pa.concat_tables([_read_one(folder, name) for name in names], promote_options="permissive")


def _read_one(storage: Disk, name: str) -> pa.Table:
    try:
        return read_parquet(storage, name)
    except (OSError, pa.ArrowException) as error:
        raise pa.ArrowInvalid(f"{name}: {error}") from error
