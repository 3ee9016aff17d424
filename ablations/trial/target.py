"""What all trials of a run have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ablations.trial.trial import CLASSIFY, ModelFacts, Trial


@dataclass(frozen=True)
class Target:
    """The model, and the images that trials are evaluated and calibrated on."""

    facts: ModelFacts
    workload: str
    data_digest: str
    images: int
    batch: int
    calibration: str = ""  # digest of the images on which cost targets are met
    task: str = CLASSIFY  # what is asked of the model

    def trial(self, *, calibrated: bool, batch: int | None = None, **fields: Any) -> Trial:
        """A trial on these; ``fields`` are those of its own. ``calibrated``: it, or its training, seeks a setting."""
        return Trial(
            model=self.facts.name,
            weights=self.facts.weights,
            weights_digest=self.facts.weights_digest,
            workload=self.workload,
            data_digest=self.data_digest,
            images=self.images,
            batch=batch or self.batch,
            calibration=self.calibration if calibrated else "",
            task=self.task,
            **fields,
        )
