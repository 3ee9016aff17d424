"""What one run works with: the images, the models, and the plan; all that is fixed before the first trial."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ablations.measure.opening import Subject, facts_of, open_subject
from ablations.models.digits import shows_clips
from ablations.models.loading import RANDOM
from ablations.models.model_names import chosen_name
from ablations.run.jobs import Computation, computations
from ablations.spec import expand as plan
from ablations.spec.checks import Unsuited
from ablations.spec.model import SpecFile, find_specs
from ablations.store.store import Store
from ablations.tasks import task_of
from ablations.trial.target import Target
from ablations.trial.trial import CLASSIFY, RESULT_VERSION, ModelFacts, Trial
from ablations.workloads import (
    ImageSource,
    LoadedModel,
    Reading,
    Workload,
    default_models,
    open_model,
    parse_sampling,
)
from reducers import reduce_tokens

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
    img_size: str | None = None  # "384" or "384,320": what the models read, where not their own size
    frames: str | None = None  # "16": of the clips that the models read, where not their own number
    stride: int | None = None  # of clips: see ``workloads.videos.sampling``
    views: str | None = None  # of clips: "3", or "4x3"
    weights: str | None = None
    specs: tuple[str, ...] = ()
    limit: int | None = None
    batch: int | None = None
    strict: bool = False
    download: bool = False
    labels: str | None = None  # see ``workloads.reading``
    links: bool = True
    task: str = CLASSIFY  # what is asked of the models: see ``ablations.tasks``

    def __post_init__(self) -> None:
        if not task_of(self.task).needs_labels and self.labels is not None:
            raise ValueError(f"the task {self.task} reads no labels: leave LABELS={self.labels} (--labels) out")
        for name in ("limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} leaves nothing to evaluate; give 1 or more")
        self.chosen()
        parse_sampling(self.stride, self.views)

    def chosen(self) -> list[tuple[str, str | None]]:
        """The models of the run and the weights of each, in the order given; the first is the run's main one."""
        names = [self._name(name) for name in self.model.split()] if self.model else []
        if len(names) != len(set(names)):
            raise ValueError(f"--model {self.model!r} names a model twice; name each once")
        if not names:
            names = [self._name(name) for name in default_models(self.workload)]
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

    def _name(self, name: str) -> str:
        return chosen_name(name, self.img_size, self.frames)

    @property
    def reading(self) -> Reading:
        """How folders are read; a file by its full path, for whoever reads them elsewhere."""
        return Reading(self.labels, self.links).located()

    @property
    def source(self) -> ImageSource:
        """Where the run's images come from."""
        return ImageSource(
            self.workload, self.data, self.train_data, limit=self.limit, strict=self.strict, download=self.download,
            reading=self.reading, sampling=parse_sampling(self.stride, self.views),
        )  # fmt: skip

    @property
    def model_name(self) -> str:
        """The run's main model."""
        return self.chosen()[0][0]


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
            "task": self.target.task,
        }


def open_session(settings: Settings) -> Session:
    """Read and check everything; nothing has been computed or written but decoded images when this returns."""
    files = tuple(
        find_specs(settings.specs, clips=shows_clips(settings.workload))
    )  # a slip in a spec is found before any image is decoded
    store = Store(settings.out).create()
    chosen = settings.chosen()
    if not any(file.spec.models == "all" for file in files):
        chosen = chosen[:1]
    subjects = {
        name: open_subject(
            settings.source, name, weights=weights, cache=store.cache, batch=settings.batch, task=settings.task
        )
        for name, weights in chosen
    }
    planned = [(subject.target, subject.loaded) for subject in subjects.values()]
    trials = _trials(files, planned, named=bool(settings.specs))
    return Session(settings, store, subjects, tuple(file for file in files if file.spec.name in trials), trials)


def _trials(
    files: Sequence[SpecFile], models: Sequence[tuple[Target, LoadedModel]], *, named: bool
) -> dict[str, list[Trial]]:
    """The plan: for each spec its trials, with the main model or with each. Of specs that nobody named those are left
    out of which a model can carry out nothing.
    """
    planned: dict[str, list[Trial]] = {}
    unsuited: list[Unsuited] = []
    for file in files:
        try:
            planned[file.spec.name] = [
                trial
                for target, loaded in (models if file.spec.models == "all" else models[:1])
                for trial in plan.expand(file, target, check=partial(reduce_tokens, loaded.model))
            ]
        except Unsuited as error:
            if named:
                raise
            log.warning("%s is left out for %s: %s", file.spec.name, models[0][0].facts.name, error.reason)
            unsuited.append(error)
    if unsuited and not planned:
        raise unsuited[0]
    return planned


@dataclass(frozen=True, eq=False)
class Preview:
    """What specs come to on a model, with neither its weights nor any image at hand."""

    facts: ModelFacts
    specs: tuple[SpecFile, ...]
    trials: dict[str, list[Trial]]  # by spec name; their keys mean nothing, for want of digests


def preview(settings: Settings) -> Preview:
    """Check specs against the models; raises what is wrong with them."""
    files = tuple(find_specs(settings.specs, clips=shows_clips(settings.workload)))
    known: list[tuple[Target, LoadedModel]] = []
    for name, _ in settings.chosen():
        loaded = open_model(name, weights=RANDOM, workload_name=settings.workload)
        known.append((Target(facts_of(name, loaded), settings.workload, "", 0, settings.batch or 1), loaded))
    trials = _trials(files, known, named=bool(settings.specs))
    return Preview(known[0][0].facts, tuple(file for file in files if file.spec.name in trials), trials)
