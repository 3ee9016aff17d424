"""A finished training is kept and never repeated: by the digest of its recipe, initial weights and images."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ablations.measure.attention import Shape, attention_for
from ablations.measure.context import TrialContext
from ablations.measure.finetune import checkpoint
from ablations.measure.finetune.aim import settled
from ablations.measure.finetune.loop import FinetuneError, Finetuning, wanted
from ablations.precision import Arithmetic, precision_on
from ablations.records.files import atomic, locked
from ablations.trial.code import training_code
from ablations.trial.recipe import Recipe, parse_recipe
from ablations.trial.stages import AS_USUAL, HostOptions, Training
from ablations.trial.trial import ModelFacts
from ablations.workloads.base import Workload
from ablations.workloads.training import TrainingAccess, TrainingImages
from reducers import Placement, reduce_tokens
from reducers.hosts import host_of

log = logging.getLogger(__name__)

FINETUNE_VERSION = 1
"""Part of every digest: raise it whenever the code would train other weights by the same recipe."""

_CHECKPOINT_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Machine:
    """What trains, and who hears of it. Nothing here changes a weight but by how its device rounds."""

    device: torch.device
    workers: int = 0  # processes that load images
    every: float = _CHECKPOINT_EVERY  # seconds between checkpoints
    report: Callable[[dict[str, Any]], None] | None = None  # hears of each epoch
    beat: Callable[[], None] | None = None  # called after each update, for whoever watches over hanging work
    arithmetic: Arithmetic | None = None  # what is computed in; None: what the recipe and the device make of it


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A finished training."""

    model: nn.Module  # the plain timm model with its new weights, in eval mode
    reducers: Mapping[str, Tensor]  # the reducers' own trained tensors, by block: "3.weight"
    record: Mapping[str, Any]  # training, epochs, train_images, train_seconds, train_precision, attention, teacher, …

    def load_reducers(self, placement: Placement) -> Placement:
        """Put the reducers' trained tensors into the parameters of a placement; one without parameters stays as it is.

        The placement may have another budget than the one that was trained, where no parameter depends on it.

        Raises:
            FinetuneError: a parameter was not trained, or has another shape.
        """
        reduced = reduce_tokens(self.model, placement)  # makes the parameters that the tensors go into
        placement = placement.resolve(reduced.host.depth, reduced.host.first_free)
        blocks = nn.ModuleDict({str(block): reducer for block, reducer in placement.blocks.items()})
        wanted = blocks.state_dict()
        for name, tensor in wanted.items():
            block, _, rest = name.partition(".")
            method = placement.blocks[int(block)].name
            if name not in self.reducers:
                raise FinetuneError(
                    f"{method} at block {block} needs the weights {rest!r}, and this training has none for them: "
                    "train with the same method and settings at that block"
                )
            if self.reducers[name].shape != tensor.shape:
                raise FinetuneError(
                    f"{method} at block {block} was trained with {rest!r} of shape {list(self.reducers[name].shape)}, "
                    f"and here it has {list(tensor.shape)}: evaluate it with the settings it was trained with"
                )
        blocks.load_state_dict({name: self.reducers[name] for name in wanted})
        return placement

    def save(self, folder: Path) -> None:
        """``finetuned.safetensors`` and, where the reducers have weights, ``reducers.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous().clone() for key, value in self.model.state_dict().items()}
        reducers = {key: value.contiguous().clone() for key, value in self.reducers.items()}  # no two share memory
        for file, tensors in (("finetuned.safetensors", weights), ("reducers.safetensors", reducers)):
            if tensors:
                with atomic(folder / file) as temporary:
                    save_file(tensors, temporary)


def trained_model(
    training: Training | str, context: TrialContext, *, report: Callable[[dict[str, Any]], None] | None = None
) -> nn.Module:
    """The context's model after a trial's ``training``: from OUT/cache/finetuned if finished, else trained now.

    A training that was interrupted goes on from its checkpoint; two processes that ask at once do the work once.
    ``report`` is called after each epoch with epoch, epochs, loss, top1, lr, seconds, eta and images.
    """
    return finetuned(training, context, report=report).model


def finetuned(
    training: Training | str,
    context: TrialContext,
    *,
    report: Callable[[dict[str, Any]], None] | None = None,
    host: HostOptions = AS_USUAL,
) -> Finetuned:
    """As ``trained_model``, with the reducers' own weights and the record of the training; ``host``: how the model is
    driven meanwhile.
    """
    if context.cache is None:
        raise FinetuneError(
            "a training keeps its scenes, checkpoints and result in OUT/cache, and the context has none"
        )
    access = TrainingAccess(context.source, context.facts.name, context.cache, classes=context.facts.classes)
    recipe = settled(parse_recipe(training, workload=context.workload.name), context, host)
    machine = Machine(context.device, report=report, beat=context.beat, arithmetic=context.arithmetic)
    done = trained_from(
        context.model, context.facts, recipe, access, evaluated=context.workload, machine=machine, host=host
    )
    return dataclasses.replace(done, record={**done.record, "training": recipe.training().text})


def trained_from(
    model: nn.Module,
    facts: ModelFacts,
    recipe: Recipe,
    access: TrainingAccess,
    *,
    evaluated: Workload,
    machine: Machine,
    host: HostOptions = AS_USUAL,
) -> Finetuned:
    """A model after a recipe whose budgets are known; ``evaluated`` are the images it must not see."""
    images = access.open(augment=recipe.augment, holdout=recipe.holdout, seed=recipe.seed, evaluated=evaluated)
    log.info("%d training images, %d evaluated", len(images), len(evaluated))
    about = identity(recipe, model=facts.name, weights_digest=facts.weights_digest, images=images, host=host)
    folder = access.cache / "finetuned"
    return train_or_load(recipe, model, images, identity=about, folder=folder, machine=machine, host=host)


def identity(
    recipe: Recipe, *, model: str, weights_digest: str, images: TrainingImages, host: HostOptions = AS_USUAL
) -> dict[str, Any]:
    """Everything that decides the result of a training, as plain data; options of the host where there are any."""
    return {
        "version": FINETUNE_VERSION,
        "code": training_code(recipe.stages),
        "recipe": recipe.spec(),
        "model": model,
        "weights": weights_digest,
        "images": images.digest,
        **({"host": host.text} if host else {}),
    }


def identity_digest(about: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with every part of an identity."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def train_or_load(
    recipe: Recipe,
    dense: nn.Module,
    images: TrainingImages,
    *,
    identity: Mapping[str, Any],
    folder: Path,
    machine: Machine,
    host: HostOptions = AS_USUAL,
) -> Finetuned:
    """The finished training of this identity below ``folder``, trained first where there is none."""
    digest = identity_digest(identity)
    folder.mkdir(parents=True, exist_ok=True)
    final, unfinished = folder / f"{digest}.safetensors", folder / f"{digest}.checkpoint"
    with locked(folder / f"{digest}.lock", what=f"the training {digest}"):
        state = _finished(final, identity)
        if state is None:
            chosen = machine.arithmetic or _arithmetic(recipe, dense, machine.device, folder)
            training = Finetuning(
                recipe, dense, images, device=machine.device, workers=machine.workers, host=host, arithmetic=chosen
            )
            training.run(
                path=unfinished, identity=identity, every=machine.every, report=machine.report, beat=machine.beat
            )
            state = _result(training)
            checkpoint.save(final, identity=identity, state=state)
            unfinished.unlink(missing_ok=True)
    model = copy.deepcopy(dense)
    model.load_state_dict(state["model"])
    return Finetuned(model.to(machine.device).eval(), state["reducers"], {**state["record"], "digest": digest})


def _arithmetic(recipe: Recipe, dense: nn.Module, device: torch.device, folder: Path) -> Arithmetic:
    """What this device computes a recipe in; how sizes come into attention is measured once for all trainings here."""
    precision = precision_on(device, wanted(recipe))
    return Arithmetic(
        precision, attention_for(Shape.of(host_of(dense), recipe.batch), precision, device=device, folder=folder)
    )


def _result(training: Finetuning) -> dict[str, Any]:
    """What the finished file holds."""
    recipe = training.recipe
    model, reducers = training.trained()
    record = {
        "epochs": recipe.epochs,
        "train_images": training.updates * recipe.batch * recipe.accumulate,
        "train_seconds": training.spent(),
        "train_precision": training.arithmetic.precision,
        "attention": training.attention,
        "teacher": training.objective.teacher is not None,
        "curve": training.curve,
    }
    return {"model": model, "reducers": reducers, "record": record}


def _finished(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return checkpoint.load(path, identity=identity)
    except checkpoint.OtherTraining:
        raise
    except checkpoint.CheckpointError as error:
        log.warning("%s: the model is trained again", error)
        return None
