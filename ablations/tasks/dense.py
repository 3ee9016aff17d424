"""Dense: which patches are the object, and of which class, by a linear head on the map that is put together again.

The head is fitted on the dense model's features of scenes that are never evaluated, and stays as it is for every
reduced model: what is compared is how well their maps stand in for the dense one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.records.patch_iou import ious, miou, swaps
from ablations.records.wilson import wilson
from ablations.tasks.base import Task
from ablations.workloads import embedded
from ablations.workloads.base import Workload, WorkloadError
from ablations.workloads.digits import mask_patches
from reducers import Placement, reduce_tokens
from reducers.hosts import host_of
from reducers.runtime import ReducedViT, Shared
from reducers.trace import Trace

SCENES = 512  # on which the head is fitted
_DECAY = 1e-4  # of its weights, for features of unit spread
_STEPS = 100  # of L-BFGS; each looks at all patches
RESAMPLES = 2000
_AT_ONCE = 100  # resamples


class Dense(Task):
    """Intersection over union of patches, the mean over the classes and the background (mIoU).

    The label of a patch is the class of the image where a pixel of its object's mask lies in the patch, else the
    background. Each image keeps its intersections and unions, so that its metric of any choice of images follows.
    Interval: the middle 95 % of resampled images. Test: swaps of the two results of an image.
    """

    name = "dense"
    summary = "patches against the mask of the object, by a linear head: mIoU"
    needs_labels = True
    answers = "features"
    kept = ("prediction", "correct", "intersection", "union")
    fitted = ("head",)
    restores = True
    metric = "mIoU"
    column = "miou"
    value = "intersection"
    dimensions = 2

    def check(self, workload: Workload) -> None:
        if workload.masks is None or workload.name not in embedded.SCENES:
            raise WorkloadError(
                f"the task dense holds patches against masks of objects, and {workload.name} has none: take "
                f"WORKLOAD={' or '.join(embedded.SCENES)}, or another task"
            )

    def targets(self, workload: Workload, grid: tuple[int, int]) -> np.ndarray:
        """(n, 1 + N0): the class of the image, and behind it those of its patches."""
        assert workload.masks is not None, "checked when the images were opened"
        inside = mask_patches(np.asarray(workload.masks), workload.masks.shape[1] // grid[0])
        labels = np.asarray(workload.labels)[:, None]
        return np.concatenate([labels, np.where(inside, labels, workload.classes)], axis=1)

    def fit(self, model: nn.Module, workload: Workload, *, batch: int, device: torch.device) -> dict[str, np.ndarray]:
        """``head`` (D + 1, K), K classes and the background: weights, and last the biases."""
        scenes = embedded.training_scenes(workload.name, SCENES)
        plain = reduce_tokens(model, Placement()).eval()
        with torch.no_grad():
            maps = [
                plain.features(scenes.batch(start, start + batch).to(device), restore="owner").cpu()
                for start in range(0, len(scenes), batch)
            ]
        targets = self.targets(scenes, host_of(model).map_grid)[:, 1:].flatten()
        return {"head": fitted_head(torch.cat(maps).flatten(0, 1).numpy(), targets, classes=workload.classes + 1)}

    def ask(self, model: nn.Module, images: Tensor) -> Tensor:
        return self.trace(reduce_tokens(model, Placement()), images, None, restore="owner")[0]

    def keep(self, answer: Tensor, *, labels: np.ndarray, fitted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._read(answer, labels, fitted["head"])
        return {name: found[name] for name in self.kept}

    def trace(self, fast: ReducedViT, images: Tensor, shared: Shared | None, *, restore: str) -> tuple[Tensor, Trace]:
        """The map patch by patch and the logits behind it: (B, N0 D + classes)."""
        dense, logits, trace = fast.trace_features(images, restore, shared)
        return torch.cat([dense.flatten(1), logits], dim=1), trace

    def columns(
        self, answer: Tensor, *, labels: np.ndarray, reference: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        found = self._read(answer, labels, reference["head"])
        agrees = found["prediction"] == reference["prediction"]
        return {**found, "label": labels[:, 0], "dense_correct": reference["correct"], "_agrees": agrees}

    def _read(self, answer: Tensor, labels: np.ndarray, head: np.ndarray) -> dict[str, np.ndarray]:
        """Class of each image; intersections and unions of patches by class, (B, K) int64 each."""
        width, classes = head.shape[0] - 1, head.shape[1]
        dense, logits = answer.split([answer.shape[1] - classes + 1, classes - 1], dim=1)
        weights = torch.from_numpy(np.array(head)).to(answer.device)
        scores = dense.double().unflatten(1, (-1, width)) @ weights[:-1] + weights[-1]
        truth = torch.from_numpy(np.array(labels[:, 1:])).to(answer.device)
        said, true = (F.one_hot(each, classes).bool() for each in (scores.argmax(2), truth))  # (B, N0, K)
        prediction = logits.argmax(1).cpu().numpy().astype(np.int64)
        return {
            "prediction": prediction,
            "correct": prediction == labels[:, 0],
            "intersection": (said & true).sum(1).cpu().numpy(),
            "union": (said | true).sum(1).cpu().numpy(),
        }

    def metrics(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """``top1`` is the control: a map may be lost where the class is not."""
        values, correct = self.values(images), np.asarray(images["correct"])
        low, high = self.interval(values)
        top1_low, top1_high = wilson(int(correct.sum()), len(correct))
        return {
            "miou": float(miou(values.sum(0))),
            "miou_low": low,
            "miou_high": high,
            "background_iou": float(ious(values.sum(0))[-1]),
            "top1": float(correct.mean()),
            "top1_low": top1_low,
            "top1_high": top1_high,
            "agreement": float(images["_agrees"].mean()),
        }

    def of_plain(self, reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            "dense_miou": float(miou(self.values(reference).sum(0))),
            "dense_top1": float(reference["correct"].mean()),
        }

    def plain_in_words(self, reference: Mapping[str, np.ndarray]) -> str:
        return f"mIoU {100 * float(miou(self.values(reference).sum(0))):.1f} %"

    def row_in_words(self, row: Mapping[str, Any]) -> str:
        return f"mIoU {100 * row['miou']:.2f} %"

    def values(self, images: Mapping[str, Any]) -> np.ndarray:
        """(n, 2 K): the intersections of each image, then its unions."""
        parts = [np.asarray(images[name], dtype=np.float64) for name in ("intersection", "union")]
        return np.concatenate(parts, axis=1)

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """The middle 95 % of ``RESAMPLES`` draws of as many images from a fixed seed; of one, nothing is known."""
        count = len(values)
        if count < 2:
            return 0.0, 1.0
        random = np.random.RandomState(0)  # the frozen generator: the same draws in every version of NumPy
        found: list[np.ndarray] = []
        for _ in range(0, RESAMPLES, _AT_ONCE):
            times = random.multinomial(count, np.full(count, 1 / count), size=_AT_ONCE)
            found.append(miou(times.astype(np.float64) @ values))
        low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
        return float(low), float(high)

    def _better(self, first: np.ndarray, second: np.ndarray) -> float:
        return swaps(first, second)


def fitted_head(features: np.ndarray, labels: np.ndarray, *, classes: int) -> np.ndarray:
    """Multinomial logistic regression, by L-BFGS over all rows from zero: features (n, D), labels (n,) -> (D + 1, K)
    float64, the last row the biases. The same for the same rows.
    """
    with torch.inference_mode(False), torch.enable_grad():
        rows, truth = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(labels)
        mean, spread = rows.mean(0), rows.std(0).clamp(min=1e-6)
        rows = (rows - mean) / spread
        head = torch.zeros(rows.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([head], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            found = F.cross_entropy(rows @ head[:-1] + head[-1], truth) + _DECAY * head[:-1].square().sum()
            found.backward()
            return found

        solver.step(loss)
        weights = head.detach()[:-1] / spread[:, None]
        return torch.cat([weights, head.detach()[-1:] - mean @ weights]).numpy()


TASK = Dense()
