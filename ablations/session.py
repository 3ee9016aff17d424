"""What one run works with: the images, the model, and the plan; all that is fixed before the first trial."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ablations import plan
from ablations.evaluate import model_facts
from ablations.plan import Job, Target
from ablations.spec import SpecFile, find_specs
from ablations.store import Store
from ablations.trial import RESULT_VERSION, ModelFacts, Trial
from ablations.workloads import LoadedModel, Workload, open_model, open_workload
from reducers import Placement, reduce_tokens

log = logging.getLogger(__name__)

DEFAULT_MODELS = {"embedded": "digits_vit_small"}
DEFAULT_MODEL = "deit_tiny_patch16_224"  # of every other workload


@dataclass(frozen=True)
class Settings:
    """What a person can choose for a run."""

    out: Path = Path("results")
    workload: str = "embedded"
    data: str | None = None
    model: str | None = None
    weights: str | None = None
    specs: tuple[str, ...] = ()
    limit: int | None = None
    batch: int | None = None
    strict: bool = False
    download: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} leaves nothing to evaluate; give 1 or more")

    @property
    def model_name(self) -> str:
        return self.model or DEFAULT_MODELS.get(self.workload, DEFAULT_MODEL)


@dataclass(frozen=True, eq=False)
class Session:
    """An opened run: everything that is fixed before the first trial."""

    settings: Settings
    store: Store
    workload: Workload
    loaded: LoadedModel
    facts: ModelFacts
    target: Target
    specs: tuple[SpecFile, ...]
    trials: dict[str, list[Trial]]  # by spec name

    @property
    def all_trials(self) -> list[Trial]:
        return [trial for trials in self.trials.values() for trial in trials]

    def pending(self) -> list[Trial]:
        """The planned trials that have no finished result."""
        finished = self.store.finished()
        return [trial for trial in self.all_trials if trial.key not in finished]

    def jobs(self, trials: Sequence[Trial]) -> list[Job]:
        """The computations that answer these trials, the longest first."""
        return plan.jobs(trials, self.facts)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes rows comparable: results with another identity are stale."""
        return {
            "result_version": RESULT_VERSION,
            "workload": self.target.workload,
            "model": self.facts.name,
            "weights": self.facts.weights,
            "weights_digest": self.facts.weights_digest,
            "data_digest": self.target.data_digest,
            "images": self.target.images,
            "batch": self.target.batch,
        }


def open_session(settings: Settings) -> Session:
    """Read and check everything; nothing has been computed or written but decoded images when this returns."""
    files = tuple(find_specs(settings.specs))  # a slip in a spec is found before any image is decoded
    store = Store(settings.out).create()
    workload = open_workload(
        settings.workload,
        data=settings.data,
        model=settings.model_name,
        limit=settings.limit,
        strict=settings.strict,
        cache=store.cache,
        weights=settings.weights,
        download=settings.download,
    )
    if workload.skipped:
        log.warning("%d images could not be read and are skipped; run.json lists them", len(workload.skipped))
    loaded = open_model(
        settings.model_name, weights=settings.weights, workload_name=settings.workload, classes=workload.classes
    )
    facts = _facts(settings.model_name, loaded)
    target = Target(
        facts=facts,
        workload=workload.name,
        data_digest=workload.digest,
        images=len(workload),
        batch=settings.batch or default_batch(workload),
    )
    trials = {file.spec.name: plan.expand(file, target, check=_attachable(loaded)) for file in files}
    return Session(settings, store, workload, loaded, facts, target, files, trials)


@dataclass(frozen=True, eq=False)
class Preview:
    """What specs come to on a model, with neither its weights nor any image at hand."""

    facts: ModelFacts
    specs: tuple[SpecFile, ...]
    trials: dict[str, list[Trial]]  # by spec name; their keys mean nothing, for want of digests


def preview(settings: Settings) -> Preview:
    """Check specs against a model; raises what is wrong with them."""
    files = tuple(find_specs(settings.specs))
    loaded = open_model(settings.model_name, weights="random", workload_name=settings.workload)
    target = Target(_facts(settings.model_name, loaded), settings.workload, "", 0, settings.batch or 1)
    check = _attachable(loaded)
    trials = {file.spec.name: plan.expand(file, target, check=check) for file in files}
    return Preview(target.facts, files, trials)


def default_batch(workload: Workload) -> int:
    """Images in a batch: as many as keep a core busy without filling its memory."""
    return 32 if workload.pixels.shape[1] >= 128 else 120


def _facts(name: str, loaded: LoadedModel) -> ModelFacts:
    # a model without blocks or patches cannot be planned for: let reduce_tokens say why it is not supported
    reduce_tokens(loaded.model, Placement())
    return model_facts(loaded.model, name=name, weights=loaded.weights, digest=loaded.digest, params_m=loaded.params_m)


def _attachable(loaded: LoadedModel) -> plan.Check:
    return lambda placement: reduce_tokens(loaded.model, placement)
