"""Trial contexts: made in the driver, written under ``OUT/cache``, and opened again by every worker.

Arrays are mapped into memory from files, so that nothing large is ever sent between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ablations.measure.chance import warn_at_chance
from ablations.measure.context import DensePredictions, TrialContext, dense_predictions, device_name
from ablations.measure.probes import Probes
from ablations.measure.profile import Profile
from ablations.models.loading import RANDOM
from ablations.models.weight_files import ModelError, read_weights
from ablations.records.files import atomic, write_json
from ablations.run.session import Session, Subject, absolute
from ablations.trial.code import runtime_code
from ablations.trial.trial import RESULT_VERSION, ModelFacts
from ablations.workloads import LoadedModel, Reading, Workload, open_model

log = logging.getLogger(__name__)

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


def choose_device() -> torch.device:
    """A GPU where there is one, else the cores."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_context(
    session: Session, device: torch.device, *, model: str | None = None, profile: Profile | None = None
) -> TrialContext:
    """The context of trials run in this process; computes the plain model's predictions unless they are cached.

    ``model`` is one of the session's; None means its main one.
    """
    subject = session.main if model is None else session.subjects[model]
    profile = profile or Profile()
    subject.loaded.model.to(device)
    with profile.measure("dense"):
        dense = _dense(session, subject, device)
    log.info("%s, not reduced: top-1 %.1f %% at %.3f GMACs", subject.facts.name, 100 * dense.top1, dense.gmacs)
    warn_at_chance(subject.facts.name, subject.facts.weights, dense, subject.workload)
    return TrialContext(
        subject.workload,
        subject.loaded.model,
        subject.facts,
        dense,
        device,
        calibration=subject.calibration,
        probes=_probes(session.store.cache, subject.facts, subject.calibration, device),
        opened_as=session.settings.workload,
        data=absolute(session.settings.data),
        train_data=absolute(session.settings.train_data),
        reading=session.settings.reading,
        cache=session.store.cache,
        profile=profile,
    )


def _dense(session: Session, subject: Subject, device: torch.device) -> DensePredictions:
    found = known_dense(session, subject)
    if found is not None:
        return found
    log.info("running the plain %s on %d images", subject.facts.name, len(subject.workload))
    dense = dense_predictions(subject.loaded.model, subject.workload, batch=subject.target.batch, device=device)
    keep_dense(_dense_file(session, subject), dense)
    return dense


def known_dense(session: Session, subject: Subject) -> DensePredictions | None:
    """What the plain model says of the images, as far as this run or an earlier one has asked it."""
    found = read_dense(_dense_file(session, subject))
    return found if found is not None and len(found.prediction) == len(subject.workload) else None


def _dense_file(session: Session, subject: Subject) -> Path:
    """Where what the plain model says of these images is kept."""
    identity = [
        RESULT_VERSION, runtime_code(), subject.facts.name, subject.facts.weights_digest, subject.workload.digest,
        subject.target.batch,
    ]  # fmt: skip
    return session.store.cache / f"dense-{_short(identity)}.npz"


def read_dense(path: Path) -> DensePredictions | None:
    """Predictions of the plain model that were kept, or None where there are none that can be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return DensePredictions(arrays["prediction"], arrays["correct"], float(arrays["gmacs"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  # a damaged archive can make its readers raise nearly anything
        log.warning("%s cannot be read (%s): the plain model is run again", path, error)
        return None


def keep_dense(path: Path, dense: DensePredictions) -> None:
    """Keep predictions of the plain model for later runs and for workers."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, prediction=dense.prediction, correct=dense.correct, gmacs=np.float64(dense.gmacs))


def _probes(cache: Path, facts: ModelFacts, calibration: Workload, device: torch.device) -> Probes:
    identity = [RESULT_VERSION, facts.name, facts.weights_digest, calibration.digest, device_name(device)]
    return Probes(cache, identity=identity)


def _short(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


# --- for the workers --------------------------------------------------------------------------------------------------


def save_context(session: Session, model: str) -> Path:
    """Write what a worker needs to open the context of one of the session's models; the path to hand it.

    The plain model's predictions are a file of their own, which ``dense_file_of`` names.
    """
    subject, settings, cache = session.subjects[model], session.settings, session.store.cache
    facts = subject.facts
    path = cache / f"context-{_short([facts.name, facts.weights_digest, subject.workload.digest])}.json"
    description = {
        "workload": _save_workload(subject.workload, cache),
        "calibration": _save_workload(subject.calibration, cache),
        "opened_as": settings.workload,
        "data": absolute(settings.data),
        "train_data": absolute(settings.train_data),
        "reading": dataclasses.asdict(settings.reading),
        "cache": str(cache),
        "dense": str(_dense_file(session, subject)),
        "batch": subject.target.batch,
        "weights": _save_weights(subject, cache),
        "facts": dataclasses.asdict(facts),
    }
    write_json(path, description)
    return path


def dense_file_of(path: Path) -> Path:
    """Where a saved context expects what the plain model says of its images."""
    return Path(json.loads(path.read_text(encoding="utf-8"))["dense"])


def find_dense(path: Path, device: torch.device, *, locate: Locate = Path) -> DensePredictions:
    """What the plain model of a saved context says of its images, computed here."""
    saved = json.loads(locate(path).read_text(encoding="utf-8"))
    workload = _load_workload(saved["workload"], locate)
    model = _load_model(saved, workload, locate).model.to(device)
    return dense_predictions(model, workload, batch=saved["batch"], device=device)


def context_files(path: Path) -> list[Path]:
    """Every file that opening this context reads, its own description included; the predictions may be to come."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    arrays = [file for name in ("workload", "calibration") for file in saved[name]["arrays"].values()]
    weights = [saved["weights"]] if saved["weights"] != RANDOM else []
    return [path, *(Path(file) for file in (*arrays, saved["dense"], *weights))]


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
    facts = ModelFacts(**{**saved["facts"], "grid": tuple(saved["facts"]["grid"])})
    workload, calibration = (_load_workload(saved[name], locate) for name in ("workload", "calibration"))
    loaded = _load_model(saved, workload, locate)
    dense = read_dense(locate(Path(saved["dense"])))
    if dense is None or len(dense.prediction) != len(workload):
        raise OSError(f"the plain model's predictions are not in {saved['dense']}; run the same command again")
    facts = dataclasses.replace(facts, weights_digest=loaded.digest)  # a file that changed meanwhile must be noticed
    cache = cache or Path(saved["cache"])
    context = TrialContext(
        workload,
        loaded.model.to(device),
        facts,
        dense,
        device,
        calibration=calibration,
        probes=_probes(cache, facts, calibration, device),
        opened_as=saved["opened_as"],
        data=saved["data"],
        train_data=saved["train_data"],
        reading=Reading(**saved["reading"]),
        cache=cache,
        profile=profile or Profile(),
    )
    return context if beat is None else dataclasses.replace(context, beat=beat)


def _load_model(saved: dict[str, Any], workload: Workload, locate: Locate) -> LoadedModel:
    weights = RANDOM if saved["weights"] == RANDOM else str(locate(Path(saved["weights"])))
    name, opened_as = saved["facts"]["name"], saved["opened_as"]
    return open_model(name, weights=weights, workload_name=opened_as, classes=workload.classes)


def _save_weights(subject: Subject, cache: Path) -> str | None:
    """The file to load, or "random". A model's own weights are written down as well: a node need not reach the hub."""
    if subject.weights is not None:
        return absolute(subject.weights)
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
