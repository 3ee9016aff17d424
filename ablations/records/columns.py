"""The columns of result files, in order: what anyone's pandas or DuckDB finds in them."""

from __future__ import annotations

import pyarrow as pa

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
        ("weights_digest", _TEXT), ("dense_top1", _REAL), ("created", _TEXT), ("evaluated_batch", _WHOLE),
        ("attempts", _WHOLE), ("code", _TEXT), ("trial", _TEXT),
    ]
)  # fmt: skip
"""The columns of ``results.parquet``. ``evaluated_batch``: images at a time as it was evaluated, fewer than ``batch``
where memory ran out; ``attempts``: how often it was begun; ``trial``: the JSON that ``key`` is a digest of.
"""

IMAGE_SCHEMA = pa.schema(
    [
        ("image", _TEXT), ("label", _WHOLE), ("prediction", _WHOLE), ("correct", _FLAG), ("dense_correct", _FLAG),
        ("loss", _REAL), ("gmacs", _REAL), ("tokens", pa.list_(_WHOLE)), ("kept", pa.list_(pa.binary())),
        ("class_kept", _FLAG), ("coverage", _REAL), ("clutter", _WHOLE),
    ]
)  # fmt: skip
"""The columns of ``images/<key>.parquet``; ``kept`` holds one ``np.packbits`` of the patches a block."""


def as_known(table: pa.Table) -> pa.Table:
    """Rows as this version knows them: columns that were added since they were written are null."""
    for column in ROW_SCHEMA:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
