"""Parquet files of results: written with a checksum a page, read with every one of them looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from ablations.records.names import row_file
from ablations.records.schema import ROW_SCHEMA, as_known
from ablations.records.storage import Storage

AT_ONCE = 512  # files read together
_OWNER = b"trial"


def owned(table: pa.Table, key: str) -> pa.Table:
    """The table with the key of its trial in it: a file that got another's name is found out."""
    return table.replace_schema_metadata({_OWNER: key})


def owner(metadata: Mapping[bytes, bytes] | None) -> str | None:
    """Whose table it is; None where it does not say."""
    found = (metadata or {}).get(_OWNER)
    return None if found is None else found.decode(errors="replace")


def read_row(storage: Storage, key: str) -> pa.Table:
    """The one row of a trial's file as a table; ValueError where it holds something else."""
    rows = read_parquet(storage, row_file(key))
    _check_names(rows.column_names, ROW_SCHEMA)
    rows = as_known(rows)
    if rows.num_rows != 1 or rows["key"][0].as_py() != key or rows["status"][0].as_py() not in ("ok", "failed"):
        raise ValueError("its content does not match its name")
    return rows


def read_parquet(storage: Storage, name: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it, the checksums of all that is read verified."""
    with storage.open(name) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)


def read_together(paths: Sequence[str], *, schema: pa.Schema, filesystem: Any = None) -> pa.Table:
    """The rows of many small files in the order of these, their checksums verified; columns that a file lacks are null.
    As many as ``AT_ONCE``: of each, what reads it ahead holds far more than it holds itself.

    Raises:
        ValueError: a file has a column that the schema has not: under its right name it would be null.
    """
    options = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    verifying = pads.ParquetFileFormat(default_fragment_scan_options=options)
    files = pads.dataset(list(paths), schema=schema, format=verifying, filesystem=filesystem)
    table = files.to_table().combine_chunks()
    for file in files.get_fragments():  # each has kept its footer from being read
        _check_names(file.physical_schema.names, schema)
    return table


def _check_names(names: Sequence[str], schema: pa.Schema) -> None:
    if len(set(names)) < len(names) or not set(names) <= set(schema.names):  # no checksum covers the names
        raise ValueError("it has columns that no version up to this one writes")


def parquet(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of a Parquet file with a checksum a page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def short(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
