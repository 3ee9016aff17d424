"""What a run leaves beside its results: the record of what was run, and a few images to draw on."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from ablations.files import atomic
from ablations.inputs import versions
from ablations.session import Session, Subject
from ablations.store import Store, read_json, write_json
from ablations.workloads import Workload

SAMPLES = 8
_SAMPLE_LEVELS = (2, 4, 2)  # the plainest, those between, the busiest


def keys_in_plan(store: Store) -> dict[str, list[str]]:
    """Spec -> keys: of the last run, and of specs run earlier with the same model on the same images."""
    return planned_keys(read_json(store.out / "run.json"))


def planned_keys(run: Any) -> dict[str, list[str]]:
    """Spec -> keys of its trials, as ``run.json`` records them; {} where it does not."""
    specs = run.get("specs") if isinstance(run, dict) else None
    if not isinstance(specs, dict):
        return {}
    return {
        str(name): [str(key) for key in about.get("trials", [])]
        for name, about in specs.items()
        if isinstance(about, dict) and isinstance(about.get("trials", []), list)
    }


def write_record(session: Session, *, command: Sequence[str]) -> None:
    """``OUT/run.json``: what was run on what, and the plan. Specs of earlier runs stay if their rows still compare."""
    path = session.store.out / "run.json"
    earlier = read_json(path)
    specs: dict[str, Any] = {}
    if planned_keys(earlier) and all(earlier.get(name) == value for name, value in session.identity.items()):
        specs.update(earlier["specs"])
    for file in session.specs:
        spec = file.spec
        specs[spec.name] = {
            **{name: getattr(spec, name) for name in ("title", "question", "caption", "published")},
            "trials": [trial.key for trial in session.trials[spec.name]],
        }
    settings, facts = session.settings, session.facts
    write_json(
        path,
        {
            "project": "Sievit",
            "version": _own_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(command),
            **session.identity,
            "calibration_images": len(session.main.calibration),
            "models": [_about_model(subject) for subject in session.subjects.values()],
            "data": settings.data,
            "weights_file": session.main.weights,
            "params_m": facts.params_m,
            "depth": facts.depth,
            "patches": facts.patches,
            "grid": list(facts.grid),
            "classes": facts.classes,
            "strict": settings.strict,
            "skipped": [list(entry) for entry in session.workload.skipped],
            "versions": versions(),
            "specs": specs,
        },
    )


def _about_model(subject: Subject) -> dict[str, Any]:
    """A model of the run, for whoever reads its rows."""
    facts = subject.facts
    return {
        "model": facts.name,
        "weights": facts.weights,
        "weights_digest": facts.weights_digest,
        "weights_file": subject.weights,
        "params_m": facts.params_m,
        "depth": facts.depth,
        "patches": facts.patches,
        "width": facts.width,
        "grid": list(facts.grid),
        "data_digest": subject.target.data_digest,
    }


def write_samples(session: Session) -> None:
    """``OUT/samples``: a few images for the pictures, and which rows they are."""
    folder, workload = session.store.samples, session.workload
    entries = []
    for number, row in enumerate(sample_rows(workload)):
        name = f"{number + 1:04d}.png"
        with atomic(folder / name) as temporary:
            Image.fromarray(np.ascontiguousarray(workload.thumbnail(row))).save(temporary, format="PNG")
        entries.append({"image": workload.ids[row], "file": name, "label": int(workload.labels[row]), "row": row})
    write_json(folder / "index.json", {"grid": list(session.facts.grid), "images": entries})


def sample_rows(workload: Workload, count: int = SAMPLES) -> list[int]:
    """Images to draw: from plain to busy where the clutter is known, else evenly spaced."""
    total = len(workload)
    if total <= count:
        return list(range(total))
    if workload.clutter is None:
        return [round(i * (total - 1) / (count - 1)) for i in range(count)]
    order = np.argsort(workload.clutter, kind="stable")
    plain, between, busy = _SAMPLE_LEVELS
    inner = range(plain, total - busy)
    middle = [inner[(2 * i + 1) * len(inner) // (2 * between)] for i in range(between)]
    places = [*range(plain), *middle, *range(total - busy, total)]
    return [int(order[place]) for place in places]


def _own_version() -> str:
    try:
        return importlib.metadata.version("sievit")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
