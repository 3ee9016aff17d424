"""The one way to open a model on images: what runs, trainings and repetitions of a trial begin with."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.measure.chance import warn_at_chance
from ablations.measure.context import DensePredictions, TrialContext, dense_predictions, device_name, model_facts
from ablations.measure.probes import Probes
from ablations.measure.profile import Profile
from ablations.records.files import atomic
from ablations.tasks import Task, task_of
from ablations.trial.code import runtime_code
from ablations.trial.target import Target
from ablations.trial.trial import CLASSIFY, RESULT_VERSION, ModelFacts
from ablations.workloads import ImageSource, LoadedModel, Workload, open_images, open_model, split_calibration
from reducers import Placement, reduce_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Subject:
    """One model, with the images as it reads them."""

    source: ImageSource
    loaded: LoadedModel
    weights: str | None  # as chosen: None for the model's own, "random", or a file
    facts: ModelFacts
    workload: Workload  # the evaluated images
    calibration: Workload | None  # others, on which settings are sought
    target: Target

    @property
    def task(self) -> Task:
        """What is asked of the model."""
        return task_of(self.target.task)


def open_subject(
    source: ImageSource,
    model: str,
    *,
    weights: str | None = None,
    cache: Path | None = None,
    batch: int | None = None,
    calibrated: bool = True,
    task: str = CLASSIFY,
) -> Subject:
    """One model with its weights, and the images as it reads them.

    ``task`` is what will be asked of the model: see ``ablations.tasks``. ``cache`` is the folder that keeps decoded
    images. Without ``calibrated`` every image is evaluated, and no setting can be sought.
    """
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    labelled = task_of(task).needs_labels
    images = open_images(source, model, weights=weights, cache=cache, labelled=labelled)
    task_of(task).check(images)
    if images.skipped:
        log.warning("%d images cannot be used and are skipped; run.json and the report list them", len(images.skipped))
    loaded = open_model(
        model, weights=weights, workload_name=source.name, classes=images.classes, headless=not labelled
    )
    facts = facts_of(model, loaded)
    calibration, evaluated = split_calibration(images) if calibrated else (None, images)
    target = target_of(facts, evaluated, calibration, batch=batch or default_batch(images), task=task)
    return Subject(source, loaded, weights, facts, evaluated, calibration, target)


def facts_of(name: str, loaded: LoadedModel) -> ModelFacts:
    """What a plan needs to know of a model; one that cannot be reduced is refused."""
    # a model without blocks or patches cannot be planned for: let reduce_tokens say why it is not supported
    reduce_tokens(loaded.model, Placement())
    return model_facts(loaded.model, name=name, weights=loaded.weights, digest=loaded.digest, params_m=loaded.params_m)


def target_of(
    facts: ModelFacts, evaluated: Workload, calibration: Workload | None, *, batch: int, task: str = CLASSIFY
) -> Target:
    """What trials on these images have in common."""
    digest = "" if calibration is None else calibration.digest
    return Target(facts, evaluated.name, evaluated.digest, len(evaluated), batch, digest, task)


def default_batch(workload: Workload) -> int:
    """Images in a batch: as many as keep a core busy without filling its memory; of clips, so many frames."""
    images = 32 if workload.pixels.shape[-3] >= 128 else 120
    return max(1, images // ((workload.frames or 1) * workload.views))


def choose_device() -> torch.device:
    """A GPU where there is one, else the cores."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_context(
    subject: Subject, device: torch.device, *, cache: Path, profile: Profile | None = None
) -> TrialContext:
    """The context of trials run in this process; computes the plain model's predictions unless ``cache`` has them."""
    profile = profile or Profile()
    facts, loaded = subject.facts, subject.loaded
    loaded.model.to(device)
    with profile.measure("dense"):
        dense = known_dense(subject, cache)
        if dense is None:
            log.info("running the plain %s on %d images", facts.name, len(subject.workload))
            dense = dense_predictions(
                loaded.model, subject.workload, batch=subject.target.batch, device=device, task=subject.task
            )
            keep_dense(dense_file(subject, cache), dense)
    told = subject.task.plain_in_words(dense.reference)
    log.info("%s, not reduced: %s at %.3f GMACs", facts.name, told, dense.gmacs)
    warn_at_chance(facts.name, facts.weights, dense, subject.workload)
    return TrialContext(
        subject.workload,
        loaded.model,
        facts,
        dense,
        device,
        task=subject.task,
        calibration=subject.calibration,
        probes={} if subject.calibration is None else probes_of(facts, subject.calibration, device, cache),
        source=subject.source.located(),
        cache=cache,
        profile=profile,
    )


def probes_of(facts: ModelFacts, calibration: Workload, device: torch.device, cache: Path) -> Probes:
    """The costs that were looked at on these images, by whichever run."""
    identity = [RESULT_VERSION, facts.name, facts.weights_digest, calibration.digest, device_name(device)]
    return Probes(cache, identity=identity)


# --- what the plain model says ----------------------------------------------------------------------------------------


def known_dense(subject: Subject, cache: Path) -> DensePredictions | None:
    """What the plain model says of the images, as far as this run or an earlier one has asked it."""
    found = read_dense(dense_file(subject, cache), subject.task)
    return found if found is not None and len(found) == len(subject.workload) else None


def dense_file(subject: Subject, cache: Path) -> Path:
    """Where what the plain model says of these images is kept."""
    identity = [
        RESULT_VERSION, runtime_code(subject.task.name), subject.facts.name, subject.facts.weights_digest,
        subject.workload.digest, subject.target.batch,
    ]  # fmt: skip
    return cache / f"dense-{short_digest(identity)}.npz"


def read_dense(path: Path, task: Task) -> DensePredictions | None:
    """Answers of the plain model that were kept, or None where there are none that can be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            kept, fitted = ({name: arrays[name] for name in names} for names in (task.kept, task.fitted))
            return DensePredictions(kept, float(arrays["gmacs"]), fitted)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  # a damaged archive can make its readers raise nearly anything
        log.warning("%s cannot be read (%s): the plain model is run again", path, error)
        return None


def keep_dense(path: Path, dense: DensePredictions) -> None:
    """Keep answers of the plain model for later runs and for workers."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {**dense.reference, **dense.fitted}
        np.savez(file, gmacs=np.float64(dense.gmacs), **arrays)


def short_digest(identity: object) -> str:
    """16 hexadecimal digits of plain data, for names of files."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
