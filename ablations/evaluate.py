"""Evaluate one trial: a pure function from (trial, context) to a result.

No Ray, no files, no global state: the context holds what is costly to make and never changes a result (the model, the
images, what the plain model says of them). Speed is not measured here: trials may share their machine with others.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ablations.trial import ModelFacts, Trial, TrialError, TrialResult, base_row, failed
from ablations.workloads.base import Workload
from reducers import Placement, reduce_tokens

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_GIGA = 1e9
_VERSIONED = ("torch", "timm", "numpy")


@dataclass(frozen=True)
class DensePredictions:
    """What the plain timm model says of every image, and what it costs."""

    prediction: np.ndarray  # (n,) int64
    correct: np.ndarray  # (n,) bool
    gmacs: float  # billions of multiply-adds per image

    @property
    def top1(self) -> float:
        return float(self.correct.mean())


@dataclass(frozen=True, eq=False)
class TrialContext:
    """Caches that never change a result: made once, shared by all trials of a worker."""

    workload: Workload
    model: nn.Module  # a plain timm model, in eval mode and on ``device``
    facts: ModelFacts
    dense: DensePredictions
    device: torch.device

    @cached_property
    def object_patches(self) -> np.ndarray | None:
        """(n, N0) bool: patches that hold at least one pixel of the object, or None where no mask is known."""
        return None if self.workload.masks is None else patch_masks(self.workload.masks, self.facts.grid)


def model_facts(model: nn.Module, *, name: str, weights: str, digest: str, params_m: float) -> ModelFacts:
    """Read what a plan needs off a timm vision transformer."""
    patch_embed: Any = model.patch_embed
    rows, columns = (int(side) for side in patch_embed.grid_size)
    blocks: Any = model.blocks
    return ModelFacts(
        name=name,
        weights=weights,
        weights_digest=digest,
        params_m=params_m,
        depth=len(blocks),
        patches=int(patch_embed.num_patches),
        grid=(rows, columns),
        width=int(getattr(model, "embed_dim", 0)),
        classes=int(getattr(model, "num_classes", 0)),
        class_token=getattr(model, "cls_token", None) is not None,
    )


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson, 1927): valid near 0 and 1 too, where mean +- 2 s.d. is not."""
    if total < 1:
        return 0.0, 1.0
    share, square = successes / total, _Z95**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = _Z95 / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    # rounding must not push the end of an interval past the share it belongs to
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def patch_masks(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pixel masks (n, H, W) bool -> (n, N0) bool: a patch belongs to the object if any of its pixels does."""
    images, height, width = masks.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise TrialError(f"masks of {height} x {width} pixels do not divide into {rows} x {columns} patches")
    cells = np.asarray(masks, dtype=bool).reshape(images, rows, height // rows, columns, width // columns)
    return cells.any(axis=(2, 4)).reshape(images, rows * columns)


def spans(images: int, batch: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of each batch."""
    return ((start, min(start + batch, images)) for start in range(0, images, batch))


def versions() -> dict[str, str]:
    """The versions that a number may depend on."""
    known = {"python": platform.python_version()}
    for package in _VERSIONED:
        known[package] = importlib.metadata.version(package)
    return known


def device_name(device: torch.device) -> str:
    """The device in words, threads included, e.g. ``cpu (1 thread)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


def use_exact_float32() -> None:
    """Full float32 on a GPU as well: its shortcut to 19 bits (TF32) would change which tokens are chosen."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _finite(logits: Tensor, start: int) -> Tensor:
    bad = ~torch.isfinite(logits).all(dim=1)
    if bool(bad.any()):
        first = start + int(bad.nonzero()[0])
        raise TrialError(
            f"the logits of {int(bad.sum())} of {len(logits)} images are not finite (first: image {first}); "
            "check the weights, and whether the placement leaves any token for these images"
        )
    return logits


@torch.inference_mode()
def dense_predictions(model: nn.Module, workload: Workload, *, batch: int, device: torch.device) -> DensePredictions:
    """Run the plain timm model over all images. Its cost is counted by the same rules as a reduced model's."""
    use_exact_float32()
    predictions = [
        _finite(model(workload.batch(start, stop).to(device)), start).argmax(1).cpu().numpy()
        for start, stop in spans(len(workload), batch)
    ]
    _, trace = reduce_tokens(model, Placement()).eval().trace(workload.batch(0, 1).to(device))
    prediction = np.concatenate(predictions).astype(np.int64)
    return DensePredictions(prediction, prediction == workload.labels, float(trace.macs[0]) / _GIGA)


def run_trial(trial: Trial, context: TrialContext) -> TrialResult:
    """Evaluate a trial on every image of the workload, in float32. The same trial gives the same result anywhere."""
    started = time.perf_counter()
    _check_inputs(trial, context)
    images = _evaluate(trial, context)
    row = base_row(trial, context.facts)
    row.update(_summary(images, context))
    row.update(
        status="ok",
        seconds=time.perf_counter() - started,
        device=device_name(context.device),
        versions=json.dumps(versions(), sort_keys=True),
    )
    columns = {name: value for name, value in images.items() if not name.startswith("_")}
    return TrialResult(row, columns)


def try_trial(trial: Trial, context: TrialContext) -> TrialResult:
    """``run_trial``, with whatever goes wrong turned into a record: one broken trial must not end the others."""
    started = time.perf_counter()
    try:
        return run_trial(trial, context)
    except Exception as error:  # noqa: BLE001  # any failure at all is a result to record, with its reason
        return failed(trial, context.facts, error, seconds=time.perf_counter() - started)


def _check_inputs(trial: Trial, context: TrialContext) -> None:
    """The context must hold what the trial was planned with: a key names its inputs."""
    for name, planned, present in (
        ("data", trial.data_digest, context.workload.digest),
        ("weights", trial.weights_digest, context.facts.weights_digest),
    ):
        if planned != present:
            raise TrialError(
                f"the {name} changed after the trial was planned (digest {present[:12]} instead of "
                f"{planned[:12]}); run `python -m ablations run` again to plan with what is there now"
            )


@torch.inference_mode()
def _evaluate(trial: Trial, context: TrialContext) -> dict[str, Any]:
    """One entry per image in every column; names with a leading underscore are for the summary alone."""
    use_exact_float32()
    torch.manual_seed(trial.seed)
    model = reduce_tokens(context.model, trial.placement(context.facts.depth)).to(context.device).eval()
    parts: dict[str, list[np.ndarray]] = {}
    for start, stop in spans(len(context.workload), trial.batch):
        logits, trace = model.trace(context.workload.batch(start, stop).to(context.device))
        labels = torch.from_numpy(np.array(context.workload.labels[start:stop])).to(context.device)
        logits = _finite(logits, start)
        kept = torch.stack([trace.kept(block) for block in range(context.facts.depth)], dim=1)  # (B, depth, N0)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        batch = {
            "label": labels,
            "prediction": logits.argmax(1),
            "loss": cross_entropy(logits, labels, reduction="none"),
            "gmacs": trace.macs / _GIGA,
            "tokens": trace.tokens,
            "class_kept": trace.class_kept(context.facts.depth - 1),
            "_top5": (best == labels[:, None]).any(1),
            "_reference": trace.reference_macs / _GIGA,
            "_reducer": trace.reducer_macs / _GIGA,
            "_kept": kept,
        }
        for name, value in batch.items():
            parts.setdefault(name, []).append(value.cpu().numpy())
    return _image_columns({name: np.concatenate(values) for name, values in parts.items()}, context)


def _image_columns(columns: dict[str, Any], context: TrialContext) -> dict[str, Any]:
    """Add what follows from the predictions and the surviving patches."""
    kept: np.ndarray = columns.pop("_kept")
    bits = np.packbits(kept, axis=2)  # (n, depth, ceil(N0 / 8)): the form that images/<key>.parquet documents
    objects = context.object_patches
    coverage: list[float] | None = None
    if objects is not None:
        hits = (objects & kept[:, -1]).sum(1)
        coverage = (hits / np.maximum(objects.sum(1), 1)).tolist()  # an empty mask covers nothing: 0
    clutter = context.workload.clutter
    return {
        "image": list(context.workload.ids),
        **columns,
        "correct": columns["prediction"] == columns["label"],
        "dense_correct": context.dense.correct,
        "kept": [[block.tobytes() for block in image] for image in bits],
        "coverage": coverage,
        "clutter": None if clutter is None else np.asarray(clutter).tolist(),
    }


def _summary(images: dict[str, Any], context: TrialContext) -> dict[str, Any]:
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
        "agreement": float((images["prediction"] == context.dense.prediction).mean()),
        "gmacs_mean": float(images["gmacs"].mean()),
        "gmacs_std": float(images["gmacs"].std()),
        "reference_gmacs_mean": float(images["_reference"].mean()),
        "reducer_gmacs_mean": float(images["_reducer"].mean()),
        "dense_gmacs": context.dense.gmacs,
        "dense_top1": context.dense.top1,
        "tokens": tokens.mean(0).tolist(),
        "tokens_std": tokens.std(0).tolist(),
        "coverage": None if coverage is None else float(np.mean(coverage)),
        "class_kept": float(images["class_kept"].mean()) if context.facts.class_token else None,
    }
