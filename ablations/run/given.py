"""Trained weights that people give: read from what a training left, kept beside the results, and provided to trials.

A folder is what ``sievit train`` (OUT/train/METHOD) or ``python -m ablations.measure.finetune`` (OUT) wrote. Only
safetensors and the JSON record are read, of the folder itself. What is kept, below ``given`` of a store, is named by
its content: whoever evaluates or repeats a trial finds the weights there, wherever the folder has gone.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ablations.measure.finetune import Finetuned, FinetuneError
from ablations.measure.finetune.given import (
    GIVEN,
    facts_file,
    given_weights,
    reducers_digest,
    weights_file,
)
from ablations.measure.opening import Subject
from ablations.models.weight_files import ModelError, load_into, read_weights
from ablations.records.columns import TRAINED
from ablations.records.files import atomic, user_path
from ablations.records.storage import Disk
from ablations.search.errors import SearchError
from ablations.store.store import Store
from ablations.trial.free_settings import free_kinds
from ablations.trial.given import given_of, given_training
from ablations.trial.stages import Stages, Training
from reducers import ReducerError, placement_from
from reducers.digest import state_digest

MODEL, REDUCERS = "finetuned.safetensors", "reducers.safetensors"
RECORDS = ("finetune.json", "train.json")  # of the one command and of the other
MOST_BYTES = {MODEL: 4 * 2**30, REDUCERS: 2**30}
_KINDS: dict[str, tuple[type, ...]] = {
    "epochs": (int,), "train_images": (int,), "train_seconds": (int, float), "teacher": (bool,),
    "train_precision": (str,), "attention": (str,),
}  # fmt: skip
_LONGEST = 40  # characters of a fact
_MOST_OF_RECORD = 4 * 2**20
_MAKES_IT = (
    "`sievit train METHOD --out OUT` leaves one in OUT/train/METHOD, `python -m ablations.measure.finetune` in OUT"
)


@dataclass(frozen=True, eq=False)
class Given:
    """A training whose weights are given."""

    folder: Path  # where they came from: for people alone
    training: Training  # what trials name
    tensors: Mapping[str, Mapping[str, Tensor]]  # by digest: of the model where it was trained, of the reducers
    facts: Mapping[str, Any]  # how they were trained, as far as that is known


def folders_of(words: Sequence[str]) -> list[Path]:
    """The folders that a person names: each word is one, or as make passes it on several with spaces between."""
    parts = [part for word in words for part in ([word] if user_path(word).is_dir() else word.split())]
    return list(dict.fromkeys(user_path(part) for part in parts))


def read_given(folder: Path, subject: Subject) -> Given:
    """What a training left in a folder, checked against the model.

    Raises:
        SearchError: it is not there, damaged, of another model, or more than weights; the message names the remedy.
    """
    if not folder.is_dir():
        raise SearchError(f"--trained {folder} is no folder of a training: {_MAKES_IT}")
    about = _record(folder)
    stages = _stages(folder, about, subject)
    try:
        model = _model(folder, about, subject)
        own = _tensors(folder, REDUCERS)
        digests = {"model": "", "reducers": reducers_digest(own) if own else ""}
        if (found := state_digest(model)) != subject.facts.weights_digest:
            digests["model"] = found
        _check_reducers(folder, own, stages, subject)
    except ModelError as error:
        raise SearchError(f"--trained {folder}: {error}") from error
    if not any(digests.values()):
        raise SearchError(
            f"--trained {folder}: its weights are those of the model that is searched for, and no reducer has any of "
            "its own: nothing was trained"
        )
    tensors: dict[str, Mapping[str, Tensor]] = {}
    if digests["model"]:
        tensors[digests["model"]] = model.state_dict()
    if own:
        tensors[digests["reducers"]] = own
    return Given(folder, given_training(stages, **digests), tensors, {name: about[name] for name in TRAINED})


def keep_given(given: Given, store: Store) -> None:
    """Keep the weights beside the results of a store; what is there already, and whole, is not written again."""
    facts = f"{GIVEN}/{facts_file(given.training)}"
    if not isinstance(store.read_json(facts), dict):  # the first stay: they stand in rows
        store.write_json(facts, dict(given.facts))
    for digest, tensors in given.tensors.items():
        name = f"{GIVEN}/{weights_file(digest)}"
        content = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in sorted(tensors.items())})
        known = store.storage.entry(name)
        if known is None or known.size != len(content) or store.storage.read(name) != content:
            store.write(name, content)


def provide(training: Training, store: Store, cache: Path, plain: nn.Module) -> None:
    """See that a trial's given weights lie in a run's caches, from what is kept in the store.

    Raises:
        FinetuneError: they are not kept there any more, or are damaged.
    """
    folder = cache / GIVEN
    folder.mkdir(parents=True, exist_ok=True)
    names = [weights_file(digest) for digest in given_of(training).values() if digest]
    with suppress(FinetuneError):
        if (folder / facts_file(training)).is_file():
            given_weights(training, plain, folder)
            return
    for name in [*names, facts_file(training)]:
        try:
            _copy(f"{GIVEN}/{name}", store, folder / name)
        except OSError as error:
            raise FinetuneError(
                f"the weights that the trial was given are not in {store.storage.below(GIVEN)} ({error}): search again "
                "with --trained FOLDER, which keeps them there"
            ) from error
    given_weights(training, plain, folder)


def _copy(name: str, store: Store, to: Path) -> None:
    """A file of a store in a folder of this machine: on one disk the same file by another name."""
    with atomic(to) as temporary:
        if isinstance(store.storage, Disk):
            source = store.storage.root / name
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, temporary)
        else:
            temporary.write_bytes(store.storage.read(name))


# --- the folder -------------------------------------------------------------------------------------------------------


def _record(folder: Path) -> dict[str, Any]:
    """What the record of a training says: model, stages, and ``TRAINED``, None where they are not known."""
    for name in RECORDS:
        path = folder / name
        if path.is_symlink() or path.exists():
            break
    else:
        raise SearchError(f"--trained {folder} holds neither {' nor '.join(RECORDS)}: {_MAKES_IT}")
    _check_file(path, _MOST_OF_RECORD)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if name == RECORDS[0]:
            recipe, about = told["recipe"], told["training"]
        else:
            about = told["results"]["method"]
            recipe = json.loads(about["training"])
        facts = {**{each: about.get(each) for each in TRAINED}, "epochs": recipe.get("epochs")}
        for each, value in facts.items():
            if value is not None and not (isinstance(value, _KINDS[each]) and len(str(value)) <= _LONGEST):
                raise TypeError(f"{each} is {value!r:.40}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SearchError(
            f"{path} is no record of a training ({type(error).__name__}: {error!s:.200}): train again, or put it back "
            "as it was written"
        ) from error
    return {"model": str(told["model"]), "recipe": dict(recipe), **facts}


def _stages(folder: Path, about: Mapping[str, Any], subject: Subject) -> Stages:
    """The placement that was active, spelled out for this model."""
    facts = subject.facts
    try:
        written = about["recipe"].get("stages", [])
        if free_kinds(written):
            raise ReducerError("a budget of it is auto, and what it came to is not told")
        placed = placement_from(written, depth=facts.depth, first=facts.first_free, patches=facts.patches)
        stages = Stages.of_placement(placed)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SearchError(
            f"--trained {folder}: the placement of its training is none for {facts.name} ({error!s:.300}); it was "
            f"trained with {about['model']}"
        ) from error
    if not stages:
        raise SearchError(
            f"--trained {folder}: no reducer was active in this training, so there is none to try: give its weights as "
            f"the model's own, --weights {folder / MODEL}"
        )
    return stages


def _model(folder: Path, about: Mapping[str, Any], subject: Subject) -> nn.Module:
    """The model with the weights of the training."""
    name = subject.facts.name
    model = copy.deepcopy(subject.loaded.model)
    try:
        load_into(model, _tensors(folder, MODEL, needed=True), name=name, source=str(folder / MODEL))
    except ModelError as error:
        if about["model"] == name:
            raise
        raise SearchError(
            f"--trained {folder} is a training of {about['model']}, and the search is for {name}: search with --model "
            f"{about['model']}, or train {name} ({error!s:.300})"
        ) from error
    return model


def _check_reducers(folder: Path, own: Mapping[str, Tensor], stages: Stages, subject: Subject) -> None:
    """The reducers' own tensors fit the placement; raises SearchError."""
    found = Finetuned(subject.loaded.model, own, {})
    try:
        found.load_reducers(stages.placement(subject.facts.depth))
    except (FinetuneError, ReducerError) as error:
        raise SearchError(
            f"--trained {folder}: {REDUCERS} does not belong to the placement of its record: {error}"
        ) from error
    for name, tensor in own.items():
        if not bool(tensor.isfinite().all()):
            raise SearchError(f"--trained {folder}: {name} of {REDUCERS} is not finite: the training diverged")


def _tensors(folder: Path, name: str, *, needed: bool = False) -> dict[str, Tensor]:
    """The tensors of a file of the folder; {} where it is not there and need not be."""
    path = folder / name
    if not needed and not path.is_symlink() and not path.exists():
        return {}
    _check_file(path, MOST_BYTES[name])
    return read_weights(path)


def _check_file(path: Path, most: int) -> None:
    """A plain file of the folder itself, and not too large; raises SearchError."""
    try:
        about = path.lstat()
    except OSError as error:
        raise SearchError(
            f"{path} cannot be read ({error.strerror or error}), and it belongs to a training: {_MAKES_IT}"
        ) from error
    if not stat.S_ISREG(about.st_mode):
        raise SearchError(f"{path} is a link or no file: only files of the folder itself are read; copy it there")
    if about.st_size > most:
        raise SearchError(f"{path} has {about.st_size:,} bytes; at most {most:,} are read")
