"""Run one trial of a store again, from nothing, and compare with what is on record.

Everything is made anew in a folder of its own: images are decoded, the plain model is run, settings are sought, weights
are finetuned. What was recorded must come out to the last bit, in the row and for every image; only times, memory and
where it ran may differ.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from ablations.precision import Arithmetic
from ablations.records.names import IMAGES, RUN, images_file
from ablations.records.schema import IMAGE_SCHEMA, ROW_SCHEMA
from ablations.search.errors import SearchError
from ablations.search.parts import part, workload_of
from ablations.store.status import find_key
from ablations.store.store import Store
from ablations.tasks import Task, task_of
from ablations.trial.code import code_of
from ablations.trial.given import given_of
from ablations.trial.staleness import changed_code
from ablations.trial.trial import CLASSIFY, Trial, TrialError, trial_from
from ablations.words import in_words

if TYPE_CHECKING:
    from ablations.measure.opening import Subject

log = logging.getLogger(__name__)

MAY_DIFFER = frozenset(
    {
        "seconds", "created", "train_seconds", "peak_memory_mb", "device", "versions", "shared_prefix", "probes",
        "images_per_second", "dense_images_per_second", "speedup", "speedup_low", "speedup_high", "measured_batch",
        "code", "trial", "task", "key", "batch", "evaluated_batch", "attempts", "attention", "train_precision",
    }
)  # fmt: skip
"""Times, memory, where and by what it ran (a training's precision and attention are taken as recorded, as far as the
device has them), how many settings and attempts it took, and names made from these.
"""


class ReproduceError(ValueError):
    """A trial that cannot be run again, with the remedy."""


@dataclass(frozen=True)
class Difference:
    """A value that did not come out as recorded; ``images`` are those it differs for."""

    column: str
    recorded: Any
    now: Any
    images: int = 0


@dataclass(frozen=True)
class Reproduction:
    """How a repeated trial compares with its record."""

    trial: Trial
    recorded: Mapping[str, Any]  # the row
    now: Mapping[str, Any]
    differences: tuple[Difference, ...]
    columns: int  # compared in the row
    images: int  # compared one by one
    notes: tuple[str, ...]  # what else is different here: code, versions, device

    @property
    def same(self) -> bool:
        return not self.differences


def recorded_trial(store: Store, key: str) -> tuple[Trial, dict[str, Any]]:
    """A trial of the store and its row."""
    row = store.load(key)
    if row is None:
        raise ReproduceError(f"the result of {key} cannot be read; run the same command again to compute it anew")
    if row.get("trial") is None:
        raise ReproduceError(f"the result of {key} was written by a version that did not record its trial; run it anew")
    try:
        trial = trial_from(row["trial"])
    except TrialError as error:
        raise ReproduceError(f"{key}: {error}") from error
    if trial.key != key:
        raise ReproduceError(f"the record of {key} describes the trial {trial.key}: the file was changed")
    return trial, row


def reproduce(
    store: Store,
    key: str,
    *,
    data: str | None = None,
    train_data: str | None = None,
    weights: str | None = None,
    labels: str | None = None,
    scratch: Path | None = None,
) -> Reproduction:
    """Run a trial again and compare. ``data``, ``train_data``, ``weights`` and ``labels`` say where things are by now;
    without them, they are where the run had them. ``scratch`` is a folder to work in that may hold caches (a new one).

    Raises:
        ReproduceError: there is no such trial, or the images or weights are no longer those it was planned with.
    """
    trial, recorded = recorded_trial(store, find_key(store, key))
    run = store.read_json(RUN)
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise ReproduceError(
            f"{store.location}/run.json does not say what the trial was run with; run the same `run` command again "
            "(what is finished is not computed again)"
        )
    again, notes = as_evaluated(trial, recorded)
    with _folder(scratch) as folder, _threads(None if trial.measure else recorded.get("device")):
        row, images = _run(
            again, run["settings"], folder, store, data=data, train_data=train_data, weights=weights, labels=labels,
            arithmetic=recorded_arithmetic(recorded),
        )  # fmt: skip
    before = _before(store, key=trial.key, recorded=recorded)
    differences = [*_row_differences(recorded, row), *_image_differences(before, images)]
    notes += _surroundings(recorded, row)
    compared = len([name for name in ROW_SCHEMA.names if name not in MAY_DIFFER])
    count = 0 if before is None else before.num_rows
    return Reproduction(trial, recorded, row, tuple(differences), compared, count, tuple(notes))


def as_evaluated(trial: Trial, recorded: Mapping[str, Any]) -> tuple[Trial, list[str]]:
    """The trial to evaluate: in the batch on record, with the code there is now."""
    notes, again = [], trial
    batch = int(recorded.get("evaluated_batch") or recorded["batch"])
    if not trial.measure and batch != trial.batch:
        notes.append(f"its batch was {batch} in place of {trial.batch}, for want of memory")
    if trial.measure or batch != trial.batch:
        again = trial.evaluated(batch)
    if changed := changed_code(trial):
        notes.append(f"the code has changed since ({changed}): differences need not surprise")
    return dataclasses.replace(again, code=code_of(again)), notes


def recorded_arithmetic(recorded: Mapping[str, Any]) -> Arithmetic | None:
    """What the weights of a row were trained in; None where none were, or where an earlier version did not tell."""
    precision, attention = recorded.get("train_precision"), recorded.get("attention")
    return None if precision is None else Arithmetic(precision, attention or "mask")


def _run(
    trial: Trial, settings: Mapping[str, Any], folder: Path, store: Store, *, data: str | None, train_data: str | None,
    weights: str | None, labels: str | None, arithmetic: Arithmetic | None,
) -> tuple[dict[str, Any], pa.Table | None]:  # fmt: skip
    """Evaluate the trial in a store of its own: its row and its images, None if it failed. From the ``store`` where it
    is on record come trained weights that it was given, and nothing else.
    """
    from ablations.measure.evaluate import try_trial
    from ablations.measure.opening import choose_device, open_context, open_subject
    from ablations.run.given import provide
    from ablations.run.session import Settings
    from ablations.workloads.embedded import name_of

    files = dict(zip(settings.get("models", []), settings.get("weights_files", []), strict=False))
    opened = Settings(
        out=folder,
        workload=name_of(settings["workload"], trial.images, trial.data_digest),
        data=data or settings.get("data"),
        train_data=train_data or settings.get("train_data"),
        model=trial.model,
        weights=weights or files.get(trial.model, settings.get("weights")),
        limit=settings.get("limit"),
        batch=settings.get("batch"),
        strict=bool(settings.get("strict")),
        labels=labels or settings.get("labels"),
        links=bool(settings.get("links", True)),
        stride=settings.get("stride"),
        views=settings.get("views"),
        task=trial.task,
    )
    own = Store(folder).create()
    subject = open_subject(
        opened.source, trial.model, weights=opened.weights, cache=own.cache, batch=opened.batch, task=trial.task
    )
    if trial.data_digest != subject.target.data_digest:
        subject = _on_part(subject, trial) or subject
    for what, planned, found, remedy in (
        ("images", trial.data_digest, subject.target.data_digest, "--data"),
        ("weights", trial.weights_digest, subject.facts.weights_digest, "--weights"),
    ):
        if planned != found:
            raise ReproduceError(
                f"the {what} are not those of the trial (digest {found[:12]} in place of {planned[:12]}); "
                f"say where they are with {remedy}"
            )
    if given_of(trial.training):
        provide(trial.training, store, own.cache, subject.loaded.model)
    context = dataclasses.replace(open_context(subject, choose_device(), cache=own.cache), arithmetic=arithmetic)
    result = try_trial(trial, context)
    own.save(result)
    row = own.load(trial.key)
    assert row is not None, "what was just saved can be read"
    return row, own.load_images(trial.key) if result.ok else None


def _on_part(subject: Subject, trial: Trial) -> Subject | None:
    """The same model on the part of the images that a candidate of a search was looked at, if it is one."""
    try:
        parts = part(subject.workload, subject.calibration)
    except SearchError:  # no search is made on so few
        return None
    for positions in parts.all:
        if len(positions) == trial.images:
            workload = workload_of(subject.workload, positions)
            if workload.digest == trial.data_digest:
                target = dataclasses.replace(subject.target, data_digest=workload.digest, images=len(workload))
                return dataclasses.replace(subject, workload=workload, target=target)
    return None


def _before(store: Store, *, key: str, recorded: Mapping[str, Any]) -> pa.Table | None:
    if recorded["status"] != "ok":
        return None
    try:
        return store.load_images(key)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ReproduceError(
            f"the images of {key} cannot be read ({error}); delete {images_file(key)} and run the same command again"
        ) from error


def _row_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name in ROW_SCHEMA.names:
        if name not in MAY_DIFFER and not _same(recorded[name], now[name]):
            yield Difference(name, recorded[name], now[name])


def _same(one: object, other: object) -> bool:
    """Equal to the last bit: the text of a float names it exactly, and NaN is itself."""
    return repr(one) == repr(other)


def _image_differences(recorded: pa.Table | None, now: pa.Table | None) -> Iterator[Difference]:
    """Columns that differ, with the first image in which they do."""
    if recorded is None or now is None:
        return
    if recorded["image"].to_pylist() != now["image"].to_pylist():
        yield Difference(f"{IMAGES}/image", recorded.num_rows, now.num_rows, max(recorded.num_rows, now.num_rows))
        return
    for name in IMAGE_SCHEMA.names:
        if recorded[name].combine_chunks().equals(now[name].combine_chunks()):
            continue
        pairs = list(zip(recorded[name].to_pylist(), now[name].to_pylist(), strict=True))
        unlike = [(one, other) for one, other in pairs if not _same(one, other)]
        if unlike:
            yield Difference(f"{IMAGES}/{name}", *unlike[0], images=len(unlike))


def _surroundings(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Versions and devices that are others here."""
    notes = []
    before, here = (json.loads(row.get("versions") or "{}") for row in (recorded, now))
    unlike = [name for name in before if name in here and before[name] != here[name]]
    other = [f"{name} {before[name]}, here {here[name]}" for name in unlike]
    if other:
        notes.append(f"recorded with {'; '.join(other)}")
    if recorded.get("device") and now.get("device") and not recorded["speedup"] and recorded["device"] != now["device"]:
        notes.append(f"recorded on {recorded['device']}, here {now['device']}")
    trained, now_trained = recorded_arithmetic(recorded), recorded_arithmetic(now)
    if trained is not None and now_trained is not None and trained != now_trained:
        notes.append(f"trained in {_arithmetic(trained)}; here in {_arithmetic(now_trained)}")
    return notes


def _arithmetic(known: Arithmetic) -> str:
    return f"{known.precision} with sizes by {known.attention}"


@contextmanager
def _folder(scratch: Path | None) -> Iterator[Path]:
    if scratch is not None:
        yield scratch
        return
    with tempfile.TemporaryDirectory(prefix="sievit-reproduce-") as folder:
        yield Path(folder)


@contextmanager
def _threads(device: str | None) -> Iterator[None]:
    """As many threads as the record names, for the sake of the last bit; one, as workers have, where it names none (a
    timed trial names those of its timing).
    """
    named = re.search(r"\((\d+) threads?\)", device or "")
    before = torch.get_num_threads()
    torch.set_num_threads(int(named[1]) if named else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(found: Reproduction) -> list[str]:
    """What came out, line by line."""
    trial, row = found.trial, found.recorded
    lines = [f"{trial.key}: {trial.spec}: {in_words(trial.variant, trial.x)}, {row['placement']}, {trial.model}"]
    lines += [f"  {note}" for note in found.notes]
    if row["status"] == "failed" or found.now["status"] == "failed":
        lines.append(f"  recorded: {_ending(row)}")
        lines.append(f"  now:      {_ending(found.now)}")
    for difference in found.differences:
        where = f" ({difference.images} images)" if difference.images else ""
        lines.append(f"  {difference.column}{where}: {difference.recorded!r:.60} recorded, {difference.now!r:.60} now")
    if found.same:
        lines.append(f"the same: {found.columns} columns and {found.images} images, bit for bit")
    else:
        lines.append(f"not the same: {_plural(len(found.differences), 'column')} differ")
    return lines


def _ending(row: Mapping[str, Any]) -> str:
    return f"failed, {row['error']}" if row["status"] == "failed" else f"ok, {_task(row).row_in_words(row)}"


def _task(row: Mapping[str, Any]) -> Task:
    return task_of(row.get("task") or CLASSIFY)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
