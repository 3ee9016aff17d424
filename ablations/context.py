"""Trial contexts: made in the driver, written under ``OUT/cache``, and opened again by every worker.

Arrays are mapped into memory from files, so that nothing large is ever sent between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.files import atomic
from ablations.inputs import DensePredictions, TrialContext, dense_predictions, device_name
from ablations.probes import Probes
from ablations.profile import Profile
from ablations.session import Session, Subject
from ablations.store import write_json
from ablations.trial import RESULT_VERSION, ModelFacts
from ablations.workloads import Workload, open_model
from ablations.workloads.models import RANDOM

log = logging.getLogger(__name__)

_LARGE = ("pixels", "masks")  # mapped from files of their own, which models and later runs share
_SMALL = ("labels", "clutter")


class Contexts:
    """The context of each model, opened when its first trial comes."""

    def __init__(self, open_one: Callable[[str], TrialContext]) -> None:
        self._open_one = open_one
        self._open: dict[str, TrialContext] = {}

    def __getitem__(self, model: str) -> TrialContext:
        if model not in self._open:
            self._open[model] = self._open_one(model)
        return self._open[model]

    def items(self) -> Iterable[tuple[str, TrialContext]]:
        """Those that are open, by model."""
        return self._open.items()


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
    return TrialContext(
        subject.workload,
        subject.loaded.model,
        subject.facts,
        dense,
        device,
        calibration=subject.calibration,
        probes=_probes(session.store.cache, subject.facts, subject.calibration, device),
        opened_as=session.settings.workload,
        data=_absolute(session.settings.data),
        train_data=_absolute(session.settings.train_data),
        cache=session.store.cache,
        profile=profile,
    )


def _dense(session: Session, subject: Subject, device: torch.device) -> DensePredictions:
    identity = [
        RESULT_VERSION, subject.facts.name, subject.facts.weights_digest, subject.workload.digest, subject.target.batch,
    ]  # fmt: skip
    path = session.store.cache / f"dense-{_short(identity)}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = DensePredictions(arrays["prediction"], arrays["correct"], float(arrays["gmacs"]))
        if len(found.prediction) == len(subject.workload):
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("%s cannot be read (%s): the plain model is run again", path, error)
    log.info("running the plain %s on %d images", subject.facts.name, len(subject.workload))
    dense = dense_predictions(subject.loaded.model, subject.workload, batch=subject.target.batch, device=device)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, prediction=dense.prediction, correct=dense.correct, gmacs=np.float64(dense.gmacs))
    return dense


def _probes(cache: Path, facts: ModelFacts, calibration: Workload, device: torch.device) -> Probes:
    identity = [RESULT_VERSION, facts.name, facts.weights_digest, calibration.digest, device_name(device)]
    return Probes(cache, identity=identity)


def _absolute(path: str | None) -> str | None:
    """A file or folder by its full path: workers run elsewhere."""
    return path if path is None or path == RANDOM else str(Path(path).expanduser().absolute())


def _short(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


# --- for the workers --------------------------------------------------------------------------------------------------


def save_context(session: Session, context: TrialContext) -> Path:
    """Write what a worker needs to open the same context; the path to hand it."""
    cache, facts, dense = session.store.cache, context.facts, context.dense
    subject = session.subjects[facts.name]
    path = cache / f"context-{_short([facts.name, facts.weights_digest, subject.workload.digest])}.json"
    own = path.with_suffix(".npz")
    with atomic(own) as temporary, temporary.open("wb") as file:
        np.savez(file, prediction=dense.prediction, correct=dense.correct, gmacs=np.float64(dense.gmacs))
    description = {
        "workload": _save_workload(subject.workload, cache),
        "calibration": _save_workload(subject.calibration, cache),
        "opened_as": context.opened_as,
        "data": context.data,
        "train_data": context.train_data,
        "cache": str(cache),
        "dense": str(own),
        "weights": _absolute(subject.weights),
        "facts": dataclasses.asdict(facts),
    }
    write_json(path, description)
    return path


def load_context(path: Path, device: torch.device, *, profile: Profile | None = None) -> TrialContext:
    """Open what ``save_context`` wrote. A worker does this once, then runs many trials."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    facts = ModelFacts(**{**saved["facts"], "grid": tuple(saved["facts"]["grid"])})
    workload, calibration = (_load_workload(saved[name]) for name in ("workload", "calibration"))
    loaded = open_model(
        facts.name, weights=saved["weights"], workload_name=saved["opened_as"], classes=workload.classes
    )
    with np.load(saved["dense"], allow_pickle=False) as arrays:
        dense = DensePredictions(arrays["prediction"], arrays["correct"], float(arrays["gmacs"]))
    facts = dataclasses.replace(facts, weights_digest=loaded.digest)  # a file that changed meanwhile must be noticed
    cache = Path(saved["cache"])
    return TrialContext(
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
        cache=cache,
        profile=profile or Profile(),
    )


def _save_workload(workload: Workload, cache: Path) -> dict[str, Any]:
    stem = f"images-{workload.digest[:16]}"
    arrays = {
        name: str(_array_file(getattr(workload, name), cache / f"{stem}-{name}.npy"))
        for name in (*_LARGE, *_SMALL)
        if getattr(workload, name) is not None
    }
    about = {name: getattr(workload, name) for name in ("name", "ids", "mean", "std", "classes", "digest", "skipped")}
    return {**about, "arrays": arrays}


def _load_workload(about: dict[str, Any]) -> Workload:
    arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in about["arrays"].items()}
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
    with suppress(OSError, ValueError):  # of an earlier run, which saw the same images
        known = np.load(path, mmap_mode="r", allow_pickle=False)
        if known.shape == array.shape and known.dtype == array.dtype:
            return path
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return path
