"""Trial contexts: made in the driver, written under ``OUT/cache``, and opened again by every worker.

Arrays are mapped into memory from files, so that nothing large is ever sent between processes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from ablations.measure.context import DensePredictions, TrialContext, dense_predictions
from ablations.measure.opening import Subject, dense_file, open_context, probes_of, read_dense, short_digest
from ablations.measure.profile import Profile
from ablations.models.loading import RANDOM, located_weights
from ablations.models.weight_files import ModelError, read_weights
from ablations.records.files import atomic, write_json
from ablations.tasks import task_of
from ablations.trial.trial import ModelFacts
from ablations.workloads import ImageSource, LoadedModel, Reading, Sampling, Workload, open_model

if TYPE_CHECKING:
    from ablations.run.session import Session  # which reads specs, and needs pydantic for it

_LARGE = ("pixels", "masks")  # mapped from files of their own, which models and later runs share
_SMALL = ("labels", "clutter")
_PART = 256  # images compared at once

Locate = Callable[[Path], Path]
"""From a file as the driver names it to where it is on this machine."""


class Contexts:
    """The context of each model, opened when its first trial comes."""

    def __init__(self, open_one: Callable[[str], TrialContext]) -> None:
        self._open_one = open_one
        self._open: dict[str, TrialContext] = {}

    def __getitem__(self, model: str) -> TrialContext:
        if model not in self._open:
            self._open[model] = self._open_one(model)
        return self._open[model]


def make_context(
    session: Session, device: torch.device, *, model: str | None = None, profile: Profile | None = None
) -> TrialContext:
    """The context of trials run in this process. ``model`` is one of the session's; None means its main one."""
    subject = session.main if model is None else session.subjects[model]
    return open_context(subject, device, cache=session.store.cache, profile=profile)


# --- for the workers --------------------------------------------------------------------------------------------------


def save_context(session: Session, model: str) -> Path:
    """``save_subject`` of one of the session's models."""
    return save_subject(session.subjects[model], session.store.cache)


def save_subject(subject: Subject, cache: Path) -> Path:
    """Write what a worker needs to open the context of a model; the path to hand it.

    The plain model's predictions are a file of their own, which ``missing_dense`` names.
    """
    assert subject.calibration is not None, "a run seeks settings"
    facts = subject.facts
    identity = [facts.name, facts.weights_digest, subject.workload.digest, subject.task.name]
    path = cache / f"context-{short_digest(identity)}.json"
    description = {
        "workload": _save_workload(subject.workload, cache),
        "calibration": _save_workload(subject.calibration, cache),
        "source": dataclasses.asdict(subject.source.located()),
        "cache": str(cache),
        "dense": str(dense_file(subject, cache)),
        "batch": subject.target.batch,
        "task": subject.task.name,
        "weights": _save_weights(subject, cache),
        "facts": dataclasses.asdict(facts),
    }
    write_json(path, description)
    return path


def missing_dense(path: Path) -> Path | None:
    """Where a saved context expects what the plain model says of its images, as long as that is not known."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    file = Path(saved["dense"])
    return file if read_dense(file, task_of(saved["task"])) is None else None


def find_dense(path: Path, device: torch.device, *, locate: Locate = Path) -> DensePredictions:
    """What the plain model of a saved context says of its images, computed here."""
    saved = json.loads(locate(path).read_text(encoding="utf-8"))
    workload = _load_workload(saved["workload"], locate)
    model = _load_model(saved, workload, locate).model.to(device)
    return dense_predictions(model, workload, batch=saved["batch"], device=device, task=task_of(saved["task"]))


def context_files(path: Path) -> list[Path]:
    """Every file that opening this context reads, its own description included; the predictions may be to come."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    arrays = [file for name in ("workload", "calibration") for file in saved[name]["arrays"].values()]
    weights = [saved["weights"]] if saved["weights"] != RANDOM else []
    return [path, *(Path(file) for file in (*arrays, saved["dense"], *weights))]


def facts_from(saved: Mapping[str, Any]) -> ModelFacts:
    """The facts as ``save_subject`` wrote them."""
    options = {name: tuple(values) for name, values in saved["options"].items()}
    tuples = {name: None if saved[name] is None else tuple(saved[name]) for name in ("grid", "map_grid", "closed")}
    return ModelFacts(**{**saved, **tuples, "options": options})


def load_context(
    path: Path,
    device: torch.device,
    *,
    profile: Profile | None = None,
    locate: Locate = Path,
    cache: Path | None = None,
    beat: Callable[[], None] | None = None,
) -> TrialContext:
    """Open what ``save_context`` wrote. A worker does this once, then runs many trials.

    On a machine that does not see the files of the one that wrote them, ``locate`` says where each is here, and
    ``cache`` is a folder of its own. ``beat`` is called at every sign of progress.
    """
    saved = json.loads(locate(path).read_text(encoding="utf-8"))
    facts = facts_from(saved["facts"])
    workload, calibration = (_load_workload(saved[name], locate) for name in ("workload", "calibration"))
    loaded = _load_model(saved, workload, locate)
    task = task_of(saved["task"])
    dense = read_dense(locate(Path(saved["dense"])), task)
    if dense is None or len(dense) != len(workload):
        raise OSError(f"the plain model's predictions are not in {saved['dense']}; run the same command again")
    facts = dataclasses.replace(facts, weights_digest=loaded.digest)  # a file that changed meanwhile must be noticed
    cache = cache or Path(saved["cache"])
    context = TrialContext(
        workload,
        loaded.model.to(device),
        facts,
        dense,
        device,
        task=task,
        calibration=calibration,
        probes=probes_of(facts, calibration, device, cache),
        source=_source(saved),
        cache=cache,
        profile=profile or Profile(),
    )
    return context if beat is None else dataclasses.replace(context, beat=beat)


def _load_model(saved: dict[str, Any], workload: Workload, locate: Locate) -> LoadedModel:
    weights = RANDOM if saved["weights"] == RANDOM else str(locate(Path(saved["weights"])))
    name, opened_as = saved["facts"]["name"], _source(saved).name
    headless = not task_of(saved["task"]).needs_labels
    return open_model(name, weights=weights, workload_name=opened_as, classes=workload.classes, headless=headless)


def _source(saved: dict[str, Any]) -> ImageSource:
    source = saved["source"]
    return ImageSource(
        **{**source, "reading": Reading(**source["reading"]), "sampling": Sampling(**source["sampling"])}
    )


def _save_weights(subject: Subject, cache: Path) -> str | None:
    """The file to load, or "random". A model's own weights are written down as well: a node need not reach the hub."""
    if subject.weights is not None:
        return located_weights(subject.weights)
    path = cache / f"weights-{subject.facts.weights_digest[:16]}.safetensors"
    weights = {name: tensor.cpu().contiguous() for name, tensor in subject.loaded.model.state_dict().items()}
    with suppress(OSError, ModelError):  # of an earlier run
        known = read_weights(path)
        if known.keys() == weights.keys() and all(torch.equal(known[name], weights[name]) for name in weights):
            return str(path)
    with atomic(path) as temporary:
        save_file(weights, temporary)
    return str(path)


def _save_workload(workload: Workload, cache: Path) -> dict[str, Any]:
    stem = f"images-{workload.digest[:16]}"
    arrays = {
        name: str(_array_file(getattr(workload, name), cache / f"{stem}-{name}.npy"))
        for name in (*_LARGE, *_SMALL)
        if getattr(workload, name) is not None
    }
    about = {name: getattr(workload, name) for name in ("name", "ids", "mean", "std", "classes", "digest", "skipped")}
    return {**about, "arrays": arrays}


def _load_workload(about: dict[str, Any], locate: Locate) -> Workload:
    files = {name: locate(Path(file)) for name, file in about["arrays"].items()}
    arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items()}
    return Workload(
        name=about["name"],
        pixels=arrays["pixels"],
        labels=np.array(arrays["labels"]),
        ids=tuple(about["ids"]),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        classes=about["classes"],
        digest=about["digest"],
        skipped=tuple((file, reason) for file, reason in about["skipped"]),
        masks=arrays.get("masks"),
        clutter=arrays.get("clutter"),
    )


def _array_file(array: np.ndarray, path: Path) -> Path:
    """A file that holds the array: its own if it is mapped from one whole, else one under its workload's digest."""
    source = getattr(array, "filename", None)
    if isinstance(array, np.memmap) and source is not None and str(source).endswith(".npy"):
        mapped = np.load(source, mmap_mode="r", allow_pickle=False)
        if mapped.shape == array.shape and mapped.dtype == array.dtype:
            return Path(source).absolute()
    with suppress(Exception):  # of an earlier run, which saw the same images; damaged, it may raise nearly anything
        if _equal(np.load(path, mmap_mode="r", allow_pickle=False), array):
            return path
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return path


def _equal(known: np.ndarray, array: np.ndarray) -> bool:
    """To the last byte: a disk may have lost some of a file that was whole. Part by part, for it may be large."""
    if known.shape != array.shape or known.dtype != array.dtype:
        return False
    parts = (slice(start, start + _PART) for start in range(0, len(array), _PART))
    return all(np.array_equal(known[part], array[part]) for part in parts)
