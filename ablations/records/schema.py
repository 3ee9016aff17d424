"""The columns of result files as Arrow's schemas."""

from __future__ import annotations

import pyarrow as pa

from ablations.records.columns import IMAGE, ROW, Kind

_TYPES = {
    Kind.TEXT: pa.string(),
    Kind.REAL: pa.float64(),
    Kind.WHOLE: pa.int64(),
    Kind.FLAG: pa.bool_(),
    Kind.REALS: pa.list_(pa.float64()),
    Kind.WHOLES: pa.list_(pa.int64()),
    Kind.BYTES: pa.list_(pa.binary()),
}

ROW_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in ROW.items()])
IMAGE_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in IMAGE.items()])


def as_known(table: pa.Table) -> pa.Table:
    """Rows as this version knows them: columns that were added since they were written are null."""
    for column in ROW_SCHEMA:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
