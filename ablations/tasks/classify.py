"""Classification: logits against labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ablations.models.answers import logits_of
from ablations.records.paired import mcnemar_greater
from ablations.records.wilson import wilson
from ablations.tasks.base import Task
from reducers.runtime import ReducedViT, Shared
from reducers.trace import Trace


class Classify(Task):
    """How often the class with the highest logit is the label. Wilson's interval, and McNemar's exact test over the
    images on which two results disagree.
    """

    name = "classify"
    summary = "logits against labels: accuracy"
    needs_labels = True
    answers = "logits"
    kept = ("prediction", "correct")
    metric = "accuracy"
    column = "top1"
    value = "correct"

    def ask(self, model: nn.Module, images: Tensor) -> Tensor:
        return logits_of(model(images))

    def keep(self, answer: Tensor, *, labels: np.ndarray, fitted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        prediction = answer.argmax(1).cpu().numpy().astype(np.int64)
        return {"prediction": prediction, "correct": prediction == labels}

    def trace(self, fast: ReducedViT, images: Tensor, shared: Shared | None, *, restore: str) -> tuple[Tensor, Trace]:
        return fast.trace(images, shared=shared)

    def columns(
        self, answer: Tensor, *, labels: np.ndarray, reference: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        truth = torch.from_numpy(np.array(labels)).to(answer.device)
        best = answer.topk(min(5, answer.shape[1]), dim=1).indices
        found = {
            "label": truth,
            "prediction": answer.argmax(1),
            "loss": cross_entropy(answer, truth, reduction="none"),
            "_top5": (best == truth[:, None]).any(1),
        }
        columns = {name: each.cpu().numpy() for name, each in found.items()}
        return {
            **columns,
            "correct": columns["prediction"] == columns["label"],
            "dense_correct": reference["correct"],
            "_agrees": columns["prediction"] == reference["prediction"],
        }

    def metrics(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """``agreement`` is the share of images to which the plain model gives the same answer."""
        correct: np.ndarray = images["correct"]
        low, high = self.interval(correct)
        return {
            "top1": float(correct.mean()),
            "top1_low": low,
            "top1_high": high,
            "top5": float(images["_top5"].mean()),
            "agreement": float(images["_agrees"].mean()),
        }

    def of_plain(self, reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"dense_top1": float(reference["correct"].mean())}

    def plain_in_words(self, reference: Mapping[str, np.ndarray]) -> str:
        return f"top-1 {100 * float(reference['correct'].mean()):.1f} %"

    def row_in_words(self, row: Mapping[str, Any]) -> str:
        return f"top-1 {100 * row['top1']:.2f} %"

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """Wilson's score interval."""
        return wilson(int(values.sum()), len(values))

    def _better(self, first: np.ndarray, second: np.ndarray) -> float:
        return mcnemar_greater(int((first > second).sum()), int((second > first).sum()))


TASK = Classify()
