"""Reading the Parquet files of a run, the checksums of every page looked at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

log = logging.getLogger(__name__)

_AT_ONCE = 512  # small files read together: of each, what reads it ahead holds far more than it holds itself


def read_rows(path: Path) -> pa.Table:
    """A file of rows, its checksums looked at; ArrowInvalid, with its name, where it is damaged."""
    try:
        return pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise pa.ArrowInvalid(f"{path.name}: {error}") from error


def read_together(parts: Sequence[Path], *, needed: Sequence[str]) -> pa.Table:
    """The rows of many small files, those of older versions included: columns they lack are null. Those that
    are ``needed`` no version lacks.
    """
    paths = [str(path) for path in parts]
    known = pa.unify_schemas([pq.read_schema(path) for path in (paths[0], paths[-1])], promote_options="permissive")
    try:
        groups = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
        verifying = pads.ParquetFileFormat(
            default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
        )
        read = [pads.dataset(group, schema=known, format=verifying).to_table().combine_chunks() for group in groups]
        table = pa.concat_tables(read)
        if set(needed) <= set(table.column_names):
            return table
    except (OSError, pa.ArrowException) as error:
        log.debug("read one by one: %s", error)
    return pa.concat_tables(map(read_rows, parts), promote_options="permissive")
