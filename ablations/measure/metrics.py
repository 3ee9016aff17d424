"""From a traced batch to what is kept of it: per-image columns, and the summary that becomes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ablations.records.wilson import wilson
from ablations.trial.trial import TrialError
from reducers.trace import Trace

GIGA = 1e9


def patch_masks(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pixel masks (n, H, W) bool -> (n, N0) bool: a patch belongs to the object if any of its pixels does."""
    images, height, width = masks.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise TrialError(f"masks of {height} x {width} pixels do not divide into {rows} x {columns} patches")
    cells = np.asarray(masks, dtype=bool).reshape(images, rows, height // rows, columns, width // columns)
    return cells.any(axis=(2, 4)).reshape(images, rows * columns)


def finite(logits: Tensor, start: int) -> Tensor:
    """The logits, or an error that names the first image whose are not finite; ``start`` is where the batch begins."""
    bad = ~torch.isfinite(logits).all(dim=1)
    if bool(bad.any()):
        first = start + int(bad.nonzero()[0])
        raise TrialError(
            f"the logits of {int(bad.sum())} of {len(logits)} images are not finite (first: image {first}); "
            "check the weights, and whether the placement leaves any token for these images"
        )
    return logits


def batch_columns(logits: Tensor, trace: Trace, *, labels: np.ndarray, depth: int) -> dict[str, np.ndarray]:
    """One entry per image of the batch in every column; names with a leading underscore are for the summary alone."""
    truth = torch.from_numpy(np.array(labels)).to(logits.device)
    kept = torch.stack([trace.kept(block) for block in range(depth)], dim=1)  # (B, depth, N0)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    columns = {
        "label": truth,
        "prediction": logits.argmax(1),
        "loss": cross_entropy(logits, truth, reduction="none"),
        "gmacs": trace.macs / GIGA,
        "tokens": trace.tokens,
        "class_kept": trace.class_kept(depth - 1),
        "_top5": (best == truth[:, None]).any(1),
        "_reference": trace.reference_macs / GIGA,
        "_reducer": trace.reducer_macs / GIGA,
        "_kept_last": kept[:, -1],
    }
    arrays = {name: value.cpu().numpy() for name, value in columns.items()}
    # (B, depth, ceil(N0 / 8)) uint8: the form that images/<key>.parquet documents, and an eighth of the memory
    return {**arrays, "_kept": np.packbits(kept.cpu().numpy(), axis=2)}


def image_columns(
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    ids: Sequence[str],
    dense_correct: np.ndarray,
    objects: np.ndarray | None,
    clutter: np.ndarray | None,
) -> dict[str, Any]:
    """The batches joined, with what follows from the predictions and the surviving patches.

    ``objects`` (n, N0) bool are the patches of each image's object, where known.
    """
    columns: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    bits, last = columns.pop("_kept"), columns.pop("_kept_last")
    coverage: list[float] | None = None
    if objects is not None:
        hits = (objects & last).sum(1)
        coverage = (hits / np.maximum(objects.sum(1), 1)).tolist()  # an empty mask covers nothing: 0
    return {
        "image": list(ids),
        **columns,
        "correct": columns["prediction"] == columns["label"],
        "dense_correct": dense_correct,
        "kept": [[block.tobytes() for block in image] for image in bits],
        "coverage": coverage,
        "clutter": None if clutter is None else np.asarray(clutter).tolist(),
    }


def summary(images: Mapping[str, Any], *, dense_prediction: np.ndarray) -> dict[str, Any]:
    """The metrics of the row. Means are over images; ``top1_low`` and ``top1_high`` are the 95 % Wilson interval."""
    correct: np.ndarray = images["correct"]
    tokens: np.ndarray = images["tokens"]
    low, high = wilson(int(correct.sum()), len(correct))
    coverage = images["coverage"]
    return {
        "top1": float(correct.mean()),
        "top1_low": low,
        "top1_high": high,
        "top5": float(images["_top5"].mean()),
        "agreement": float((images["prediction"] == dense_prediction).mean()),
        "gmacs_mean": float(images["gmacs"].mean()),
        "gmacs_std": float(images["gmacs"].std()),
        "reference_gmacs_mean": float(images["_reference"].mean()),
        "reducer_gmacs_mean": float(images["_reducer"].mean()),
        "tokens": tokens.mean(0).tolist(),
        "tokens_std": tokens.std(0).tolist(),
        "coverage": None if coverage is None else float(np.mean(coverage)),
        "class_kept": float(images["class_kept"].mean()),
    }
