"""The seam between evaluation and task: what a task says of itself, and what the evaluation asks it.

The evaluation runs models batch by batch and knows neither labels nor logits. A task asks the model, and turns its
answer into arrays with one entry for each image; its metrics, their intervals and its paired test come from those
alone, so that resampling images needs no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ablations.workloads.base import Workload
from reducers.runtime import ReducedViT, Shared
from reducers.trace import Trace


class Task(ABC):
    """What is asked of a model. A task has no state: everything comes by argument.

    B images in a batch, n in all. ``labels``: ``targets`` of the images at hand. ``reference``: what ``keep`` found of
    the plain model, by the names in ``kept``, here of the same images, and what ``fit`` found, by those in ``fitted``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for people
    needs_labels: ClassVar[bool]  # images without classes are refused, and models without a classifier
    answers: ClassVar[str]  # what it reads of a model, in the plural: "logits"
    kept: ClassVar[tuple[str, ...]]  # names of the arrays that are kept of the plain model
    fitted: ClassVar[tuple[str, ...]] = ()  # names of the arrays that are fitted on the plain model, of no image
    restores: ClassVar[bool] = False  # it reads a dense map, so that rules of ``reducers.restore`` make a difference

    metric: ClassVar[str]  # the primary metric, for people: "accuracy"
    column: ClassVar[str]  # its column in a row; ``{column}_low`` and ``{column}_high`` are the 95 % interval
    value: ClassVar[str]  # the column of the images of which it is the mean
    higher_is_better: ClassVar[bool] = True
    dimensions: ClassVar[int] = 1  # of ``values``; a search goes by the mean over images, and takes tasks of 1

    def check(self, workload: Workload) -> None:  # noqa: B027  # most tasks take them all
        """Refuse images that it cannot ask about.

        Raises:
            WorkloadError: the message names what they lack, and the remedy.
        """

    def targets(self, workload: Workload, grid: tuple[int, int]) -> np.ndarray:
        """(n, …) int64: what the answers are held against; grid: rows and columns of the map behind the model."""
        return workload.labels

    def fit(self, model: nn.Module, workload: Workload, *, batch: int, device: torch.device) -> dict[str, np.ndarray]:
        """What is fitted on the plain model before it is asked, on images that are never evaluated; by ``fitted``."""
        return {}

    @abstractmethod
    def ask(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the plain model answers to images (B, C, H, W): (B, …)."""

    @abstractmethod
    def keep(self, answer: Tensor, *, labels: np.ndarray, fitted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What is kept of the plain model's answer, an entry an image, for each name in ``kept``. labels: (B,) int64,
        -1 where there is none.
        """

    @abstractmethod
    def trace(self, fast: ReducedViT, images: Tensor, shared: Shared | None, *, restore: str) -> tuple[Tensor, Trace]:
        """What a reduced model answers, (B, …), and the trace of its tokens and cost, in one pass. ``restore``: by
        which rule tokens are put back in their places, where the task ``restores``.
        """

    @abstractmethod
    def columns(
        self, answer: Tensor, *, labels: np.ndarray, reference: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The columns of one batch, an entry an image; names with a leading underscore are for ``metrics`` alone."""

    @abstractmethod
    def metrics(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of the row that come from the columns of all images, the primary metric's three among them."""

    @abstractmethod
    def of_plain(self, reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The columns of the row that say what the plain model reaches on all images."""

    @abstractmethod
    def plain_in_words(self, reference: Mapping[str, np.ndarray]) -> str:
        """What the plain model answers, for the log."""

    @abstractmethod
    def row_in_words(self, row: Mapping[str, Any]) -> str:
        """The primary metric of a row, for people: "top-1 71.20 %"."""

    def values(self, images: Mapping[str, Any]) -> np.ndarray:
        """(n,) float64: the quantity of each image whose mean is the primary metric; or several (n, …) of which it
        comes, where ``dimensions`` says so.
        """
        return np.asarray(images[self.value], dtype=np.float64)

    @abstractmethod
    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """The 95 % interval of the primary metric of ``values``."""

    def better(self, first: np.ndarray, second: np.ndarray) -> float:
        """How surely the first result is better than the second: the one-sided p-value of a paired test.

        Both are ``values`` of the same images in the same order.

        Raises:
            ValueError: they are not of the same number of images, or of none.
        """
        if first.shape != second.shape or first.ndim != self.dimensions or not len(first):
            raise ValueError(f"a paired test compares results on the same images, not {first.shape} and {second.shape}")
        return self._better(first, second) if self.higher_is_better else self._better(second, first)

    @abstractmethod
    def _better(self, first: np.ndarray, second: np.ndarray) -> float:
        """The p-value of: the first has higher values."""
