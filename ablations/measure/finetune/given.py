"""Weights that were trained elsewhere: read from the caches of a run, where they lie by the digest of their content.

A trial names them by those digests (``trial.given``), so that it is the same trial wherever they came from.
``ablations.run.given`` reads what people give and puts it there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ablations.measure.context import TrialContext
from ablations.measure.finetune.cache import Finetuned
from ablations.measure.finetune.cache import finetuned as trained_here
from ablations.measure.finetune.loop import FinetuneError
from ablations.models.weight_files import ModelError, read_weights
from ablations.records.columns import TRAINED
from ablations.trial.given import given_of, training_digest
from ablations.trial.stages import AS_USUAL, HostOptions, Training
from reducers.digest import state_digest, tensors_digest

GIVEN = "given"  # the folder


def finetuned(
    training: Training | str,
    context: TrialContext,
    *,
    report: Callable[[dict[str, Any]], None] | None = None,
    host: HostOptions = AS_USUAL,
) -> Finetuned:
    """The model with the weights of a ``training``: as they are given, else as ``cache.finetuned`` trains them.

    Raises:
        FinetuneError: weights that are given are not there, or are not those.
    """
    if isinstance(training, Training) and given_of(training):
        if context.cache is None:
            raise FinetuneError("weights that are given lie in OUT/cache, and the context has none")
        found = given_weights(training, context.model, context.cache / GIVEN)
        return dataclasses.replace(found, model=found.model.to(context.device))
    return trained_here(training, context, report=report, host=host)


def given_weights(training: Training, plain: nn.Module, folder: Path) -> Finetuned:
    """A copy of the plain model with the weights that are given, and the reducers' own, from files in a folder.

    Raises:
        FinetuneError: as of ``finetuned``.
    """
    model, digests = copy.deepcopy(plain), given_of(training)
    if digests["model"]:
        tensors = _read(folder, digests["model"])
        try:
            model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise FinetuneError(f"the weights that are given do not fit the model: {error}") from error
        _check(digests["model"], state_digest(model), folder)
    reducers = _read(folder, digests["reducers"]) if digests["reducers"] else {}
    if reducers:
        _check(digests["reducers"], reducers_digest(reducers), folder)
    return Finetuned(model.eval(), reducers, {**_facts(folder, training), "training": training.text})


def reducers_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the reducers' own tensors, whatever the order they are written in."""
    return tensors_digest(dict(sorted(tensors.items())))


def weights_file(digest: str) -> str:
    """The file of tensors."""
    return f"{digest}.safetensors"


def facts_file(training: Training) -> str:
    """The file that says how weights were trained, as far as that is known."""
    return f"{training_digest(training)}.json"


def _read(folder: Path, digest: str) -> dict[str, Tensor]:
    try:
        return read_weights(folder / weights_file(digest))
    except ModelError as error:
        raise FinetuneError(f"weights that a trial was given are not kept any more: {error}") from error


def _check(wanted: str, found: str, folder: Path) -> None:
    if found != wanted:
        raise FinetuneError(
            f"{folder / weights_file(wanted)} holds other weights than its name says (digest {found[:12]}): delete it, "
            "and give the folder of the training again"
        )


def _facts(folder: Path, training: Training) -> dict[str, Any]:
    """How the weights were trained; None for what is not known."""
    try:
        told = json.loads((folder / facts_file(training)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    return {name: told.get(name) if isinstance(told, dict) else None for name in TRAINED}
