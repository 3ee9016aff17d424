"""Whether the plain model is right more often than by chance: if not, its labels or its weights are not what they seem.

Nothing that is measured on such a model means anything, and no trial by itself would show it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablations.measure.context import DensePredictions
from ablations.records.wilson import wilson
from ablations.workloads import Workload

log = logging.getLogger(__name__)

_TELLING = 0.05  # the interval must end this near to chance, or the images are too few to tell
_NEAR = 0.02  # so near to chance a model is useless even where it is surely above it: some labels fit by accident


@dataclass(frozen=True)
class Chance:
    """How often the plain model is right beside how often labels drawn at random would be."""

    correct: int
    images: int
    classes: int
    expected: float  # the share that the model's answers and the labels, each shuffled, would have in common
    low: float  # 95 % interval of the share that is right
    high: float

    @property
    def at_chance(self) -> bool:
        """Whether it is no better than chance, on so many images that a model which knows the classes would show."""
        return self.high < self.expected + _TELLING and (self.low <= self.expected or self.high < self.expected + _NEAR)

    def as_data(self) -> dict[str, Any]:
        """As ``run.json`` keeps it, with each model."""
        return {
            "top1": self.correct / self.images,
            "images": self.images,
            "classes": self.classes,
            "chance": self.expected,
            "at_chance": self.at_chance,
        }


def chance_of(dense: DensePredictions, workload: Workload) -> Chance:
    """Compare what the plain model said of these images with chance.

    Chance is what shuffled answers would reach (the p_e of Cohen's kappa): for balanced classes one in their number,
    and for a model that always answers the same the share of that class. Where the images are of a single class,
    shuffling changes nothing, and chance is one of the head's classes.
    """
    classes = workload.classes
    labels = np.bincount(workload.labels, minlength=classes) / len(workload)
    answers = np.bincount(dense.reference["prediction"], minlength=classes)[:classes] / len(workload)
    expected = float(labels @ answers) if labels.max() < 1 else 0.0
    correct = int(dense.reference["correct"].sum())
    low, high = wilson(correct, len(workload))
    return Chance(correct, len(workload), classes, max(expected, 1 / classes), low, high)


def warn_at_chance(name: str, weights: str, dense: DensePredictions, workload: Workload) -> None:
    """Say loudly that a plain model knows nothing of these images; nothing where it was not asked for classes."""
    if not dense.classifies:
        return
    found = chance_of(dense, workload)
    if not found.at_chance:
        return
    why = "its weights are random"
    if weights != "random":
        why = (
            "the labels are probably not in the order of its head (see LABELS), or the weights or the images are others"
            " than they seem"
        )
    log.warning(
        "WARNING: %s, not reduced, is at chance level: %d of %d images right (%.2f %%; chance is %.2f %%): %s. "
        "No result of this run says anything about accuracy",
        name,
        found.correct,
        found.images,
        100 * found.correct / found.images,
        100 * found.expected,
        why,
    )
