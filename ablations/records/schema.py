"""The columns of result files as Arrow's schemas."""

from __future__ import annotations

import pyarrow as pa

from ablations.records.columns import IMAGE, IMAGE_ADDED_LATER, ROW, Kind

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


def images_as_known(table: pa.Table) -> pa.Table:
    """The images of a trial as this version knows them: columns that were added since they were written are null.

    Raises:
        ValueError: it has other columns than any version writes.
    """
    later = [name for name in IMAGE_ADDED_LATER if name not in table.column_names]
    if not table.schema.equals(pa.schema([each for each in IMAGE_SCHEMA if each.name not in later])):
        raise ValueError("it has columns that no version up to this one writes")
    for name in later:
        column = IMAGE_SCHEMA.field(name)
        table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table.select(IMAGE_SCHEMA.names)
