"""The trials of a plan as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from ablations.trial.labels import blocks_of, labels_of, placement_label, target_label
from ablations.trial.trial import Trial


def trial_rows(trials: Sequence[Trial], patches: int) -> list[list[str]]:
    """Variant, x, placement, budget and seed of each trial; ``patches`` is what the model starts with."""
    return [
        [
            trial.variant,
            "" if trial.x is None else f"{trial.x:g}",
            placement_label(blocks_of(trial.stage_list())),
            _budget(trial, patches),
            str(trial.seed),
        ]
        for trial in trials
    ]


def _budget(trial: Trial, patches: int) -> str:
    """``K = 48``, ``0.50 of dense: K = auto``, and what else is done with the trial."""
    budget = labels_of(trial.stage_list(), patches)["budget"] or ""
    parts = [budget if trial.target is None else f"{target_label(trial.target)}: {budget}"]
    if trial.training:
        parts.append("finetuned")
    if trial.measure:
        parts.append(f"{trial.measure} at batch {trial.batch}")
    return ", ".join(part for part in parts if part)
