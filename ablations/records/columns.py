"""The columns of result files, in order: what anyone's pandas or DuckDB finds in them. Standard library alone.

``schema`` makes Arrow's schemas of them, ``trial`` an empty row, and the analysis the types that it expects.
"""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What a column holds."""

    TEXT = "text"
    REAL = "real number"
    WHOLE = "whole number"
    FLAG = "true or false"
    REALS = "list of real numbers"
    WHOLES = "list of whole numbers"
    BYTES = "list of bytes"


_TEXT, _REAL, _WHOLE, _FLAG = Kind.TEXT, Kind.REAL, Kind.WHOLE, Kind.FLAG

ROW: dict[str, Kind] = {
    "spec": _TEXT, "key": _TEXT, "status": _TEXT, "error": _TEXT, "model": _TEXT, "params_m": _REAL, "weights": _TEXT,
    "workload": _TEXT, "images": _WHOLE, "batch": _WHOLE, "seed": _WHOLE, "finetuned": _FLAG, "training": _TEXT,
    "epochs": _WHOLE, "train_images": _WHOLE, "train_seconds": _REAL, "teacher": _FLAG, "placement": _TEXT,
    "blocks": Kind.WHOLES, "reducer": _TEXT, "variant": _TEXT, "x": _REAL, "score": _TEXT, "budget": _TEXT,
    "target": _REAL, "target_gmacs": _REAL, "target_reached": _FLAG, "target_note": _TEXT, "calibrated": _FLAG,
    "calibration_gmacs": _REAL, "calibration_images": _WHOLE, "probes": _WHOLE, "top1": _REAL, "top1_low": _REAL,
    "top1_high": _REAL, "top5": _REAL, "agreement": _REAL, "gmacs_mean": _REAL, "gmacs_std": _REAL,
    "reference_gmacs_mean": _REAL, "reducer_gmacs_mean": _REAL, "dense_gmacs": _REAL, "tokens": Kind.REALS,
    "tokens_std": Kind.REALS, "coverage": _REAL, "class_kept": _REAL, "images_per_second": _REAL,
    "dense_images_per_second": _REAL, "speedup": _REAL, "speedup_low": _REAL, "speedup_high": _REAL,
    "measured_batch": _WHOLE, "peak_memory_mb": _REAL, "shared_prefix": _FLAG, "seconds": _REAL, "device": _TEXT,
    "versions": _TEXT, "data_digest": _TEXT, "weights_digest": _TEXT, "dense_top1": _REAL, "created": _TEXT,
    "evaluated_batch": _WHOLE, "attempts": _WHOLE, "code": _TEXT, "trial": _TEXT, "task": _TEXT,
    "cosine": _REAL, "cosine_low": _REAL, "cosine_high": _REAL, "miou": _REAL, "miou_low": _REAL, "miou_high": _REAL,
    "background_iou": _REAL, "dense_miou": _REAL, "restore": _TEXT, "fill": _TEXT, "spread": _TEXT,
    "over": _TEXT, "missing": _TEXT, "views": _WHOLE, "attention": _TEXT, "train_precision": _TEXT,
}  # fmt: skip
"""The columns of ``results.parquet``. ``evaluated_batch``: images at a time as it was evaluated, fewer than ``batch``
where memory ran out; ``attempts``: how often it was begun; ``trial``: the JSON that ``key`` is a digest of; ``task``:
what was asked of the model (null: ``classify``, in rows of the time before there were others); ``cosine``: the mean
over images of ``embed``, with its 95 % interval; ``miou``: of ``dense``, over classes and the background, whose own is
``background_iou``; ``restore``: by which rule tokens were put back in their places for it; ``fill``,
``spread``, ``over``, ``missing``: options of the model's host (null: it has none of that name); ``views``: of a clip,
whose costs and tokens are those of all its views together (null: images); ``attention``: how the sizes of tokens came
into attention, ``mask``, or ``fold`` where weights were trained in half precision on a GPU and that was measured to be
quicker; ``train_precision``: what matrix products of that training were computed in (null: nothing was trained).
"""

TRAINED = ("epochs", "train_images", "train_seconds", "teacher", "train_precision", "attention")
"""Of those, what a training tells of itself (null, of weights that were given: it is not known)."""

OPTIONS = ("fill", "spread", "over", "missing")
"""Of those, the options of a model's host: how it is driven where a reducer acts."""

IMAGE: dict[str, Kind] = {
    "image": _TEXT, "label": _WHOLE, "prediction": _WHOLE, "correct": _FLAG, "dense_correct": _FLAG, "loss": _REAL,
    "gmacs": _REAL, "tokens": Kind.WHOLES, "kept": Kind.BYTES, "class_kept": _FLAG, "coverage": _REAL,
    "clutter": _WHOLE, "cosine": _REAL, "intersection": Kind.WHOLES, "union": Kind.WHOLES,
    "motion": Kind.REALS,
}  # fmt: skip
"""The columns of ``images/<key>.parquet``; ``kept`` holds one ``np.packbits`` of the patches a block; ``intersection``
and ``union`` count patches, of each class and last of the background; ``motion`` says of each frame of a clip how much
changes from the frame before, as a mean share of white.
"""

IMAGE_ADDED_LATER = ("cosine", "intersection", "union", "motion")
"""Those that files of earlier versions lack."""


def row_columns(*kinds: Kind) -> tuple[str, ...]:
    """The columns of a row that hold such values, in order."""
    return tuple(name for name, kind in ROW.items() if kind in kinds)
