"""Embedding: pooled features against those of the dense model. Neither labels nor a classifier are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablations.records.mean import mean_interval
from ablations.records.sign_flips import sign_flips
from ablations.tasks.base import Task
from reducers import Placement, reduce_tokens
from reducers.runtime import ReducedViT, Shared
from reducers.trace import Trace

_SMALLEST = 1e-30  # length below which an embedding has no direction; its cosine is 0


class Embed(Task):
    """The cosine between the pooled features of the reduced model and those of the dense one, image by image: what the
    head reads, or where there is none, the output. Student's interval of the mean, and a sign-flip test.
    """

    name = "embed"
    summary = "pooled features against the dense model's: cosine; needs no labels and no classifier"
    needs_labels = False
    answers = "features"
    kept = ("features",)
    metric = "cosine"
    column = "cosine"
    value = "cosine"

    def ask(self, model: nn.Module, images: Tensor) -> Tensor:
        return reduce_tokens(model, Placement()).features(images)

    def keep(self, answer: Tensor, *, labels: np.ndarray, fitted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"features": answer.float().cpu().numpy()}

    def trace(self, fast: ReducedViT, images: Tensor, shared: Shared | None, *, restore: str) -> tuple[Tensor, Trace]:
        return fast.trace(images, shared, pooled=True)

    def columns(
        self, answer: Tensor, *, labels: np.ndarray, reference: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        dense = torch.from_numpy(np.array(reference["features"])).to(answer.device)
        return {"cosine": cosine(answer, dense).cpu().numpy()}

    def metrics(self, images: Mapping[str, Any]) -> dict[str, Any]:
        values = self.values(images)
        low, high = self.interval(values)
        return {"cosine": float(values.mean()), "cosine_low": low, "cosine_high": high}

    def of_plain(self, reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {}

    def plain_in_words(self, reference: Mapping[str, np.ndarray]) -> str:
        return f"features of {reference['features'].shape[1]} numbers"

    def row_in_words(self, row: Mapping[str, Any]) -> str:
        return f"cosine {row['cosine']:.4f}"

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """Student's t interval, cut to -1 .. 1."""
        return mean_interval(values.tolist(), low=-1.0, high=1.0)

    def _better(self, first: np.ndarray, second: np.ndarray) -> float:
        return sign_flips(first - second).greater


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(B,) float64 in -1 .. 1: the cosine of the angle between the rows of two (B, D)."""
    one, other = (each.double() / each.double().norm(dim=1, keepdim=True).clamp(min=_SMALLEST) for each in (one, other))
    return (one * other).sum(dim=1).clamp(-1.0, 1.0)


TASK = Embed()
