"""What one run works with: the images, the models, and the plan; all that is fixed before the first trial."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ablations.measure.context import model_facts
from ablations.models.loading import RANDOM
from ablations.records.files import user_path
from ablations.run.jobs import Computation, computations
from ablations.spec import expand as plan
from ablations.spec.expand import Target
from ablations.spec.model import SpecFile, find_specs
from ablations.store.store import Store
from ablations.trial.trial import RESULT_VERSION, ModelFacts, Trial
from ablations.workloads import (
    LoadedModel,
    Reading,
    Workload,
    default_models,
    open_model,
    open_workload,
    split_calibration,
)
from reducers import Placement, reduce_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a person can choose for a run.

    ``model`` and ``weights`` may name several, with spaces between; specs of one model take the first, those that say
    ``models: all`` take each.
    """

    out: Path | str = Path("results")  # or a URI: s3://bucket/folder
    workload: str = "embedded"
    data: str | None = None
    train_data: str | None = None
    model: str | None = None
    weights: str | None = None
    specs: tuple[str, ...] = ()
    limit: int | None = None
    batch: int | None = None
    strict: bool = False
    download: bool = False
    labels: str | None = None  # see ``workloads.reading``
    links: bool = True

    def __post_init__(self) -> None:
        for name in ("limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} leaves nothing to evaluate; give 1 or more")
        self.chosen()

    def chosen(self) -> list[tuple[str, str | None]]:
        """The models of the run and the weights of each, in the order given; the first is the run's main one."""
        names = self.model.split() if self.model else []
        if len(names) != len(set(names)):
            raise ValueError(f"--model {self.model!r} names a model twice; name each once")
        if not names:
            names = list(default_models(self.workload))
            if self.weights not in (None, RANDOM):
                names = names[:1]  # the file is the main model's
        if len(names) == 1 or self.weights in (None, RANDOM):
            return [(name, self.weights) for name in names]  # not split: a path may hold spaces
        files = self.weights.split()
        if len(files) != len(names):
            raise ValueError(
                f"--weights names {len(files)} files for the {len(names)} models of --model; give one for each, "
                "in the same order, or 'random'"
            )
        return list(zip(names, files, strict=True))

    @property
    def reading(self) -> Reading:
        """How folders are read; a file by its full path, for whoever reads them elsewhere."""
        chosen = Reading(self.labels, self.links)
        return chosen if chosen.file is None else Reading(absolute(self.labels), self.links)

    @property
    def model_name(self) -> str:
        """The run's main model."""
        return self.chosen()[0][0]


@dataclass(frozen=True, eq=False)
class Subject:
    """One model of a run, with the images as it reads them."""

    loaded: LoadedModel
    weights: str | None  # as chosen: None for the model's own, "random", or a file
    facts: ModelFacts
    workload: Workload  # the evaluated images
    calibration: Workload  # others, on which settings are sought
    target: Target


@dataclass(frozen=True, eq=False)
class Session:
    """An opened run: everything that is fixed before the first trial."""

    settings: Settings
    store: Store
    subjects: dict[str, Subject]  # by model name, the main one first
    specs: tuple[SpecFile, ...]
    trials: dict[str, list[Trial]]  # by spec name

    @property
    def main(self) -> Subject:
        """The model that specs take unless they say otherwise."""
        return next(iter(self.subjects.values()))

    @property
    def facts(self) -> ModelFacts:
        return self.main.facts

    @property
    def target(self) -> Target:
        return self.main.target

    @property
    def workload(self) -> Workload:
        return self.main.workload

    @property
    def all_facts(self) -> dict[str, ModelFacts]:
        """What is known of each model, by its name."""
        return {name: subject.facts for name, subject in self.subjects.items()}

    @property
    def all_trials(self) -> list[Trial]:
        return [trial for trials in self.trials.values() for trial in trials]

    def pending(self) -> list[Trial]:
        """The planned trials that have no finished result."""
        finished = self.store.finished(verify=True)
        return [trial for trial in self.all_trials if trial.key not in finished]

    def computations(self, trials: Sequence[Trial]) -> list[Computation]:
        """What has to be evaluated to answer these trials."""
        batches = {name: subject.target.batch for name, subject in self.subjects.items()}
        return computations(trials, self.all_facts, batches=batches)

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
    chosen = settings.chosen()
    if not any(file.spec.models == "all" for file in files):
        chosen = chosen[:1]
    subjects = {name: open_subject(name, weights, settings, store) for name, weights in chosen}
    return Session(settings, store, subjects, files, _trials(files, list(subjects.values())))


def absolute(path: str | None) -> str | None:
    """A file or folder by its full path, for whoever runs elsewhere; None and "random" as they are."""
    return path if path is None or path == RANDOM else str(user_path(path).absolute())


def open_subject(name: str, weights: str | None, settings: Settings, store: Store) -> Subject:
    """One model with its weights, and the images as it reads them."""
    workload = open_workload(
        settings.workload,
        data=settings.data,
        model=name,
        limit=settings.limit,
        strict=settings.strict,
        cache=store.cache,
        weights=weights,
        download=settings.download,
        reading=settings.reading,
    )
    if workload.skipped:
        log.warning(
            "%d images cannot be used and are skipped; run.json and the report list them", len(workload.skipped)
        )
    loaded = open_model(name, weights=weights, workload_name=settings.workload, classes=workload.classes)
    facts = _facts(name, loaded)
    calibration, evaluated = split_calibration(workload)
    target = Target(
        facts=facts,
        workload=workload.name,
        data_digest=evaluated.digest,
        images=len(evaluated),
        batch=settings.batch or default_batch(workload),
        calibration=calibration.digest,
    )
    return Subject(loaded, weights, facts, evaluated, calibration, target)


def _trials(files: Sequence[SpecFile], subjects: Sequence[Subject]) -> dict[str, list[Trial]]:
    """The plan: for each spec its trials, with the main model or with each."""
    return {
        file.spec.name: [
            trial
            for subject in (subjects if file.spec.models == "all" else subjects[:1])
            for trial in plan.expand(file, subject.target, check=_attachable(subject.loaded))
        ]
        for file in files
    }


@dataclass(frozen=True, eq=False)
class Preview:
    """What specs come to on a model, with neither its weights nor any image at hand."""

    facts: ModelFacts
    specs: tuple[SpecFile, ...]
    trials: dict[str, list[Trial]]  # by spec name; their keys mean nothing, for want of digests


def preview(settings: Settings) -> Preview:
    """Check specs against the models; raises what is wrong with them."""
    files = tuple(find_specs(settings.specs))
    known: list[tuple[Target, plan.Check]] = []
    for name, _ in settings.chosen():
        loaded = open_model(name, weights=RANDOM, workload_name=settings.workload)
        known.append((Target(_facts(name, loaded), settings.workload, "", 0, settings.batch or 1), _attachable(loaded)))
    trials = {
        file.spec.name: [
            trial
            for target, check in (known if file.spec.models == "all" else known[:1])
            for trial in plan.expand(file, target, check=check)
        ]
        for file in files
    }
    return Preview(known[0][0].facts, files, trials)


def default_batch(workload: Workload) -> int:
    """Images in a batch: as many as keep a core busy without filling its memory."""
    return 32 if workload.pixels.shape[1] >= 128 else 120


def _facts(name: str, loaded: LoadedModel) -> ModelFacts:
    # a model without blocks or patches cannot be planned for: let reduce_tokens say why it is not supported
    reduce_tokens(loaded.model, Placement())
    return model_facts(loaded.model, name=name, weights=loaded.weights, digest=loaded.digest, params_m=loaded.params_m)


def _attachable(loaded: LoadedModel) -> Callable[[Placement], object]:
    return lambda placement: reduce_tokens(loaded.model, placement)
