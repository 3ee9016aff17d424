"""Trial contexts: made in the driver, written under ``OUT/cache``, and opened again by every worker.

Arrays are mapped into memory from files, so that nothing large is ever sent between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch

from ablations.evaluate import DensePredictions, TrialContext, dense_predictions
from ablations.session import Session
from ablations.store import atomic, write_json
from ablations.trial import ModelFacts
from ablations.workloads import Workload, open_model

log = logging.getLogger(__name__)


def choose_device() -> torch.device:
    """A GPU where there is one, else the cores."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_context(session: Session, device: torch.device) -> TrialContext:
    """The context of trials run in this process; computes the plain model's predictions unless they are cached."""
    session.loaded.model.to(device)
    dense = _dense(session, device)
    return TrialContext(session.workload, session.loaded.model, session.facts, dense, device)


def _dense(session: Session, device: torch.device) -> DensePredictions:
    identity = json.dumps([session.identity, session.facts.name], sort_keys=True)
    path = session.store.cache / f"dense-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = DensePredictions(arrays["prediction"], arrays["correct"], float(arrays["gmacs"]))
        if len(found.prediction) == len(session.workload):
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("%s cannot be read (%s): the plain model is run again", path, error)
    log.info("running the plain model on %d images", len(session.workload))
    dense = dense_predictions(session.loaded.model, session.workload, batch=session.target.batch, device=device)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, prediction=dense.prediction, correct=dense.correct, gmacs=np.float64(dense.gmacs))
    return dense


def save_context(session: Session, context: TrialContext) -> Path:
    """Write what a worker needs to open the same context; the path to hand it."""
    cache, workload = session.store.cache, context.workload
    stem = f"context-{workload.digest[:16]}"
    arrays = {"labels": workload.labels, "pixels": workload.pixels}
    arrays |= {name: getattr(workload, name) for name in ("masks", "clutter") if getattr(workload, name) is not None}
    arrays |= {"dense_prediction": context.dense.prediction, "dense_correct": context.dense.correct}
    weights = session.settings.weights
    if weights is not None and weights != "random":
        weights = str(Path(weights).absolute())
    description = {
        "workload": {
            name: getattr(workload, name) for name in ("name", "ids", "mean", "std", "classes", "digest", "skipped")
        },
        "opened_as": session.settings.workload,
        "arrays": {name: str(_array_file(array, cache / f"{stem}-{name}.npy")) for name, array in arrays.items()},
        "weights": weights,
        "dense_gmacs": context.dense.gmacs,
        "facts": dataclasses.asdict(context.facts),
    }
    path = cache / f"{stem}-{context.facts.weights_digest[:16]}.json"
    write_json(path, description)
    return path


def _array_file(array: np.ndarray, path: Path) -> Path:
    """A file that holds the array: its own if it is mapped from one whole, else a copy."""
    source = getattr(array, "filename", None)
    if isinstance(array, np.memmap) and source is not None and str(source).endswith(".npy"):
        mapped = np.load(source, mmap_mode="r", allow_pickle=False)
        if mapped.shape == array.shape and mapped.dtype == array.dtype:
            return Path(source).absolute()
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return path


def load_context(path: Path, device: torch.device) -> TrialContext:
    """Open what ``save_context`` wrote. A worker does this once, then runs many trials."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in saved["arrays"].items()}
    about = saved["workload"]
    facts = ModelFacts(**{**saved["facts"], "grid": tuple(saved["facts"]["grid"])})
    workload = Workload(
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
    loaded = open_model(
        facts.name, weights=saved["weights"], workload_name=saved["opened_as"], classes=workload.classes
    )
    dense = DensePredictions(
        np.array(arrays["dense_prediction"]), np.array(arrays["dense_correct"]), saved["dense_gmacs"]
    )
    facts = dataclasses.replace(facts, weights_digest=loaded.digest)  # a file that changed meanwhile must be noticed
    return TrialContext(workload, loaded.model.to(device), facts, dense, device)
