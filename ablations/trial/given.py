"""Weights that were trained elsewhere, as a trial's ``training``: told by their content, not by a recipe or a path.

In functions, and not in ``Training``: that class is a part of what trains, and finished trainings keep their digests.
"""

from __future__ import annotations

import hashlib

from ablations.trial.stages import Stages, Training

_SHOWN = 6  # digits by which people tell them apart


def given_training(stages: Stages, *, model: str, reducers: str) -> Training:
    """Weights that are given: digests of the model's (``reducers.digest.state_digest``) and of the reducers' own
    tensors, "" where they are none but the plain model's; ``stages`` were active when they were trained.
    """
    return Training.of({"given": {"model": model, "reducers": reducers}, "stages": stages.data})


def given_of(training: Training) -> dict[str, str]:
    """The digests of weights that are given, by "model" and "reducers"; {} where they follow from a recipe."""
    return dict(training.data.get("given", {})) if training else {}


def training_digest(training: Training) -> str:
    """sha256 of what a training says."""
    return hashlib.sha256(training.text.encode()).hexdigest()


def short_name(training: Training) -> str:
    """What people call weights that are given: the same wherever they came from."""
    return training_digest(training)[:_SHOWN]
