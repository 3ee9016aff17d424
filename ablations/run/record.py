"""What a run leaves beside its results: the record of what was run, and a few images to draw on."""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from ablations.measure.chance import chance_of
from ablations.measure.context import versions
from ablations.measure.opening import Subject, known_dense
from ablations.models.loading import located_weights
from ablations.records.files import absolute
from ablations.records.image_counts import IMAGES_ACCOUNT
from ablations.records.kinds import ANSWERS
from ablations.records.names import INDEX, RUN, SAMPLES, planned_keys
from ablations.run.session import Session, Settings
from ablations.store.store import Store
from ablations.trial.staleness import outdated
from ablations.trial.trial import CLASSIFY, ModelFacts
from ablations.version import own_version
from ablations.workloads import Workload

log = logging.getLogger(__name__)

SAMPLE_COUNT = 8
_SAMPLE_LEVELS = (2, 4, 2)  # the plainest, those between, the busiest


def keys_in_plan(store: Store) -> dict[str, list[str]]:
    """Spec -> keys: of the last run, and of specs run earlier with the same model on the same images."""
    return planned_keys(store.read_json(RUN))


def write_record(session: Session, *, command: Sequence[str]) -> None:
    """``OUT/run.json``: what was run on what, and the plan. Specs of earlier runs stay if their rows still compare."""
    specs = _earlier_specs(session)
    for file in session.specs:
        spec = file.spec
        specs[spec.name] = {
            **{name: getattr(spec, name) for name in ("title", ANSWERS, "question", "caption", "published")},
            "trials": [trial.key for trial in session.trials[spec.name]],
        }
    settings, facts = session.settings, session.facts
    session.store.write_json(
        RUN,
        {
            "project": "Sievit",
            "version": own_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(command),
            **session.identity,
            "calibration_images": len(session.main.calibration or ()),
            "models": _about_models(session),
            "data": settings.data,
            "weights_file": session.main.weights,
            "params_m": facts.params_m,
            "depth": facts.depth,
            "patches": facts.patches,
            "grid": list(facts.grid),
            "classes": facts.classes,
            "strict": settings.strict,
            "settings": settings_in_full(settings),
            "skipped": [list(entry) for entry in session.workload.skipped],
            IMAGES_ACCOUNT: _images_account(session.workload),
            "versions": versions(),
            "specs": specs,
        },
    )


def _earlier_specs(session: Session) -> dict[str, Any]:
    """Specs of earlier runs whose rows still compare: of the same models and images, computed by the same code."""
    earlier = session.store.read_json(RUN)
    plan = planned_keys(earlier)
    if not plan or any({"task": CLASSIFY, **earlier}.get(name) != value for name, value in session.identity.items()):
        return {}
    others = {key for name, keys in plan.items() if name not in session.trials for key in keys}
    old = outdated(session.store.table(), keys=others) if others else {}
    kept = {}
    for name, keys in plan.items():  # what is run again keeps its place
        if changed := sorted({old[key] for key in keys if key in old}):
            log.info("%s was run by another version of the code (%s) and is left out", name, "; ".join(changed))
        else:
            kept[name] = earlier["specs"][name]
    return kept


def settings_in_full(settings: Settings) -> dict[str, Any]:
    """What a trial of this run needs to be run again from anywhere: paths in full."""
    names = ("workload", "data", "train_data", "model", "weights", "limit", "batch", "strict")
    about = {name: getattr(settings, name) for name in names}
    about.update(data=absolute(settings.data), train_data=absolute(settings.train_data))
    models, files = zip(*settings.chosen(), strict=True)
    about.update(labels=settings.reading.labels, links=settings.links)
    about.update(stride=settings.stride, views=settings.views)
    return {**about, "models": list(models), "weights_files": [located_weights(file) for file in files]}


def _images_account(workload: Workload) -> dict[str, Any] | None:
    """What became of every image that was found; None where none had to be looked for."""
    return None if workload.account is None else workload.account.as_data(workload.skipped)


def note_plain_models(session: Session) -> None:
    """Add to ``OUT/run.json`` what the plain models say of the images, once they were asked."""
    run = session.store.read_json(RUN)
    if isinstance(run, dict):
        session.store.write_json(RUN, {**run, "models": _about_models(session)})


def _about_models(session: Session) -> list[dict[str, Any]]:
    return [_about_model(session, subject) for subject in session.subjects.values()]


def _about_model(session: Session, subject: Subject) -> dict[str, Any]:
    """A model of the run, for whoever reads its rows."""
    facts = subject.facts
    dense = known_dense(subject, session.store.cache)
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
        "clip_grid": clip_grid(subject.workload, facts),
        "data_digest": subject.target.data_digest,
        "plain": None if dense is None or not dense.classifies else chance_of(dense, subject.workload).as_data(),
    }


def write_samples(session: Session) -> None:
    """``OUT/samples``: a few images for the pictures, and which rows they are."""
    save_samples(session.store, session.workload, session.facts)


def clip_grid(workload: Workload, facts: ModelFacts) -> tuple[int, int, int] | None:
    """(steps in time, rows, columns) of the patches of a clip; None where there are images. A step is a frame, or a
    tubelet several frames deep.
    """
    if workload.frames is None:
        return None
    (height, width), (rows, columns) = workload.pixels.shape[-3:-1], facts.grid
    of_frame = columns * height // width
    return facts.units * rows // of_frame, of_frame, columns


def save_samples(store: Store, workload: Workload, facts: ModelFacts, count: int = SAMPLE_COUNT) -> None:
    """``samples`` of a store: ``count`` images of a workload."""
    entries = []
    clip = clip_grid(workload, facts)
    steps, rows, columns = clip or (1, *facts.grid)
    for number, row in enumerate(sample_rows(workload, count)[:count]):
        name = f"{number + 1:04d}.png"
        picture = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(workload.thumbnail(row, clip and steps))).save(picture, format="PNG")
        store.write(f"{SAMPLES}/{name}", picture.getvalue())
        label = int(workload.labels[row]) if workload.classes else None
        entries.append({"image": workload.ids[row], "file": name, "label": label, "row": row})
    store.write_json(f"{SAMPLES}/{INDEX}", {"grid": [steps * rows, columns], "images": entries})


def sample_rows(workload: Workload, count: int = SAMPLE_COUNT) -> list[int]:
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
