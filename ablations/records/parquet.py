"""Parquet files of results: written with a checksum a page, read with every one of them looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from ablations.records.schema import as_known
from ablations.records.storage import Storage

SUFFIX = ".parquet"
KEY = re.compile(r"[0-9a-f]{16}")
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
    rows = as_known(read_parquet(storage, f"trials/{key}{SUFFIX}"))
    if rows.num_rows != 1 or rows["key"][0].as_py() != key or rows["status"][0].as_py() not in ("ok", "failed"):
        raise ValueError("its content does not match its name")
    return rows


def read_parquet(storage: Storage, name: str) -> pa.Table:
    """A whole Parquet file, its checksums verified."""
    with storage.open(name) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read()


def parquet(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of a Parquet file with a checksum a page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def short(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
