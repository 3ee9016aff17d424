"""From a traced batch to what is kept of it: per-image columns, and the summary that becomes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablations.trial.trial import TrialError
from reducers.trace import Trace

GIGA = 1e9


def patch_masks(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pixel masks (n, H, W) bool -> (n, N0) bool: a patch belongs to the object if any of its pixels does.

    Of clips (n, F, H, W) -> (n, F N0), ``grid`` being that of a frame.
    """
    if masks.ndim == 4:
        return patch_masks(masks.reshape(-1, *masks.shape[2:]), grid).reshape(len(masks), -1)
    images, height, width = masks.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise TrialError(f"masks of {height} x {width} pixels do not divide into {rows} x {columns} patches")
    cells = np.asarray(masks, dtype=bool).reshape(images, rows, height // rows, columns, width // columns)
    return cells.any(axis=(2, 4)).reshape(images, rows * columns)


def motion_of(pixels: np.ndarray, views: int = 1) -> np.ndarray:
    """(n, F) float64 of clips (n, F, H, W, C) uint8: how much changes from one frame to the next, the mean difference
    of pixels as a share of white. The first frame of each view, before which there is none, has that to the second.
    """
    found = []
    for clip in pixels:  # it may be a memory map of many
        frames = np.asarray(clip).reshape(views, -1, *clip.shape[1:]).astype(np.int16)
        steps = np.abs(np.diff(frames, axis=1)).mean(axis=(2, 3, 4)) / 255  # (views, F - 1)
        if steps.shape[1] == 0:
            steps = np.zeros((views, 1))
            found.append(steps.ravel())
            continue
        found.append(np.concatenate([steps[:, :1], steps], axis=1).ravel())
    return np.stack(found)


def finite(answers: Tensor, start: int, *, what: str) -> Tensor:
    """The answers (B, …), or an error that names the first image whose are not finite; ``start`` is where the batch
    begins, ``what`` their name in the plural.
    """
    bad = ~torch.isfinite(answers.flatten(1)).all(dim=1)
    if bool(bad.any()):
        first = start + int(bad.nonzero()[0])
        raise TrialError(
            f"the {what} of {int(bad.sum())} of {len(answers)} images are not finite (first: image {first}); "
            "check the weights, and whether the placement leaves any token for these images"
        )
    return answers


def of_views(answers: Tensor, views: int) -> Tensor:
    """The answers to clips (b, …) from those to their views (b · views, …), one after the other: their mean."""
    return answers if views == 1 else answers.unflatten(0, (-1, views)).mean(1)


def batch_columns(trace: Trace, *, depth: int, views: int = 1) -> dict[str, np.ndarray]:
    """What a trace says of the images of a batch, whatever was asked; names with a leading underscore are for the
    summary alone. Cost and tokens of a clip are those of all its ``views``, its patches theirs one after the other.
    """
    kept = torch.stack([trace.covered(block) for block in range(depth)], dim=1)  # (B, depth, N0)
    if views > 1:
        kept = kept.unflatten(0, (-1, views)).transpose(1, 2).flatten(2)  # (b, depth, views · N0)
    columns = {
        "gmacs": trace.macs / GIGA,
        "tokens": trace.tokens,
        "class_kept": trace.class_kept(depth - 1),
        "_reference": trace.reference_macs / GIGA,
        "_reducer": trace.reducer_macs / GIGA,
        "_kept_last": kept[:, -1],
    }
    if views > 1:
        for name in ("gmacs", "tokens", "_reference", "_reducer"):
            columns[name] = columns[name].unflatten(0, (-1, views)).sum(1)
        columns["class_kept"] = columns["class_kept"].unflatten(0, (-1, views)).all(1)
    arrays = {name: value.cpu().numpy() for name, value in columns.items()}
    # (B, depth, ceil(N0 / 8)) uint8: the form that images/<key>.parquet documents, and an eighth of the memory
    return {**arrays, "_kept": np.packbits(kept.cpu().numpy(), axis=2)}


def image_columns(
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    ids: Sequence[str],
    objects: np.ndarray | None,
    clutter: np.ndarray | None,
    motion: np.ndarray | None = None,
) -> dict[str, Any]:
    """The batches joined, with what follows from the surviving patches.

    ``objects`` (n, N0) bool are the patches of each image's object, where known; ``motion`` (n, F) of ``motion_of``.
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
        "kept": [[block.tobytes() for block in image] for image in bits],
        "coverage": coverage,
        "clutter": None if clutter is None else np.asarray(clutter).tolist(),
        "motion": None if motion is None else motion.tolist(),
    }


def summary(images: Mapping[str, Any]) -> dict[str, Any]:
    """What the row says of cost and tokens, whatever was asked: means over images, and their spread."""
    tokens: np.ndarray = images["tokens"]
    coverage = images["coverage"]
    return {
        "gmacs_mean": float(images["gmacs"].mean()),
        "gmacs_std": float(images["gmacs"].std()),
        "reference_gmacs_mean": float(images["_reference"].mean()),
        "reducer_gmacs_mean": float(images["_reducer"].mean()),
        "tokens": tokens.mean(0).tolist(),
        "tokens_std": tokens.std(0).tolist(),
        "coverage": None if coverage is None else float(np.mean(coverage)),
        "class_kept": float(images["class_kept"].mean()),
    }
