"""The training loop: updates of a model with its reducers active, from any update on, bit for bit.

The result is the weights after the last update (their moving average where the recipe keeps one). No image that is
evaluated is ever looked at; the accuracy after each epoch is over training-side images and chooses nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ablations.measure.finetune import checkpoint
from ablations.measure.finetune.data import epoch_batches, images_per_epoch
from ablations.measure.finetune.objective import Objective, TrainingViT, needs_teacher
from ablations.measure.finetune.schedule import KeepSchedule, make_optimizer, make_scheduler
from ablations.measure.finetune.training_state import own_randomness, random_state, set_random_state
from ablations.models.answers import logits_of
from ablations.models.stochastic_depth import set_drop_path
from ablations.precision import Arithmetic, Precision, autocast, in_words, precision_on
from ablations.trial.recipe import Recipe
from ablations.trial.stages import AS_USUAL, HostOptions
from ablations.workloads.base import Workload
from ablations.workloads.training import TrainingImages
from reducers.hosts import host_of
from reducers.reducer import TrainsInPhases
from reducers.runtime.fold import Attention

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]

_EVALUATED_AT_ONCE = 128


class FinetuneError(ValueError):
    """A training that cannot go on; the message names the cause and the remedy."""


def wanted(recipe: Recipe) -> Precision:
    """The precision that a recipe asks for."""
    return "float32" if recipe.amp == "none" else recipe.amp


class Finetuning:
    """One training: everything it needs, where it stands, and how it goes on."""

    def __init__(
        self,
        recipe: Recipe,
        dense: nn.Module,
        images: TrainingImages,
        *,
        device: torch.device,
        workers: int = 0,
        host: HostOptions = AS_USUAL,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """``dense``: the plain timm model to start from, which is copied and stays as it is; also the teacher.
        ``host``: how it is driven; ``arithmetic``: what it is computed in, by default what the recipe asks for as far
        as the device has units for it.
        """
        self.recipe, self.images, self.device, self._workers = recipe, images, device, workers
        self.arithmetic = arithmetic or Arithmetic(precision_on(device, wanted(recipe)))
        base: Any = copy.deepcopy(dense).to(device).train().requires_grad_(True)
        set_drop_path(base, recipe.drop_path)
        with own_randomness(recipe.seed, device):  # reducers draw their initial weights
            placement = recipe.placement(host_of(base).depth)
            self.model = TrainingViT(base, placement, host=host.data, attention=self.arithmetic.attention)
            self.model.to(device).train()
        if recipe.freeze > 0 and next(self.model.reducers.parameters(), None) is None:
            raise FinetuneError(
                f"freeze {recipe.freeze:g} holds the plain model's weights still, and the reducers have none of their "
                "own: nothing could learn; leave freeze out"
            )
        teacher = dense if needs_teacher(self.model, recipe) else None
        if teacher is not None:
            teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        self.objective = Objective(recipe, teacher, classes=host_of(base).classes)
        self.optimizer = make_optimizer(base, self.model.reducers, recipe)
        self.per_epoch = images_per_epoch(recipe, len(images)) // (recipe.batch * recipe.accumulate)  # updates
        self.updates = self.per_epoch * recipe.epochs
        self.scheduler = make_scheduler(self.optimizer, recipe, updates_per_epoch=self.per_epoch)
        self.keep = KeepSchedule(self.model.reducers, recipe, patches=self.model.host.patches)
        # parameters only: state_dict() lists a reducer that several blocks share once for each of them
        self.ema = ModelEmaV3(self.model, recipe.ema, use_warmup=True, exclude_buffers=True) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16" and device.type == "cuda")
        self.update = 0  # how many are done
        self.seconds = 0.0  # spent in earlier runs
        self.curve: list[dict[str, Any]] = []  # what was reported after each epoch
        self._sums = self._no_sums()
        self._begun = time.monotonic()

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a restart needs; the learning rate and the order of images follow from the update."""
        return {
            "update": self.update,
            "seconds": self.spent(),
            "curve": self.curve,
            "model": dict(self.model.state_dict()),
            "ema": None if self.ema is None else dict(self.ema.module.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": dict(self._sums),
            "random": random_state(self.device),
            "arithmetic": dataclasses.asdict(self.arithmetic),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.update = state["update"]
        self.seconds, self._begun = state["seconds"], time.monotonic()
        self.curve = list(state["curve"])
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.arithmetic = Arithmetic(**state["arithmetic"])  # it goes on as it began, on whatever machine
        self.model.attention = self.arithmetic.attention
        self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        set_random_state(state["random"], self.device)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        path: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        every: float = 60.0,
        report: Report | None = None,
        beat: Callable[[], None] | None = None,
    ) -> None:
        """Train to the end, from the checkpoint at ``path`` if it holds one of this ``identity``.

        A checkpoint is written every so many seconds, and after each epoch. ``beat`` is called after each update.
        """
        with own_randomness(self.recipe.seed, self.device):
            known = dict(identity or {})
            state = None if path is None else checkpoint.load_or_start_afresh(path, identity=known)
            if state is not None:
                self.restore(state)
                log.info("going on after update %d of %d", self.update, self.updates)
            log.info("%s", in_words(self.device, self.arithmetic.precision, wanted=wanted(self.recipe)))
            saved = self._begun = time.monotonic()
            while self.update < self.updates:
                for _ in self._rest_of_epoch():
                    if beat is not None:
                        beat()
                    at_end = self.update % self.per_epoch == 0
                    if at_end:
                        self._finish_epoch(report)
                    if path is not None and (at_end or time.monotonic() - saved >= every):
                        self._refuse_divergence()
                        checkpoint.save(path, identity=known, state=self.state())
                        saved = time.monotonic()
            self._refuse_divergence()

    def trained(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The result: the state of the plain model, and of the reducers by block; copies, on the CPU."""
        final = self.model if self.ema is None else self.ema.module
        return _copied(final.base), _copied(final.reducers)

    def _rest_of_epoch(self) -> Any:
        """One update after the other to the end of the epoch; between them, the state is whole."""
        epoch, done = divmod(self.update, self.per_epoch)
        accumulate = self.recipe.accumulate
        batches = epoch_batches(
            self.images,
            self.recipe,
            epoch=epoch,
            first=done * accumulate,
            workers=self._workers,
            pin=self.device.type == "cuda",
        )
        for number, (images, labels) in enumerate(batches):
            if number % accumulate == 0:
                self.scheduler.step_update(self.update)
                self.keep.set(self.update / self.per_epoch)
                self._enter_phase(self.update / self.updates)
            self._accumulate(images, labels)
            if (number + 1) % accumulate == 0:
                self._step()
                yield

    def _enter_phase(self, share: float) -> None:
        """Who learns in this update, and by which curriculum: functions of ``share`` alone, so that a restart agrees.

        What a reducer sets for the plain model's weights goes over what the recipe sets.
        """
        if self.recipe.freeze > 0:
            self.model.base.requires_grad_(share >= self.recipe.freeze)
        for member in self.model.reducing():
            if member.steps.trains_in_phases:
                cast(TrainsInPhases, member).train_phase(share, self.model.base)

    def _accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Add one micro-batch's share to the gradient."""
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        images, targets = self.objective.mixed(images, labels)
        with autocast(self.device, self.arithmetic.precision):
            parts = self.objective.parts(self.model, images, targets)
        loss = torch.stack(list(parts.values())).sum()
        if not loss.requires_grad:
            raise FinetuneError(
                f"no weight that may learn has a part in the loss of update {self.update + 1}: lower freeze, which "
                "holds the plain model's weights still, or give the reducer a loss of its own"
            )
        self.scaler.scale(loss / self.recipe.accumulate).backward()
        with torch.no_grad():
            self._sums["loss"] += loss.detach().double()
            self._sums["task"] += parts["task"].detach().double()
            self._sums["batches"] += 1

    def _step(self) -> None:
        """One update from the gradient gathered so far."""
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.update)

    # --- after an epoch -----------------------------------------------------------------------------------------------

    def _finish_epoch(self, report: Report | None) -> None:
        sums = {name: float(value) for name, value in self._sums.items()}
        self._sums = self._no_sums() if self.update < self.updates else self._sums
        top1 = None if self.images.held_out is None else self.accuracy(self.images.held_out)
        spent = self.spent()
        facts = {
            "epoch": self.update // self.per_epoch,
            "epochs": self.recipe.epochs,
            "loss": sums["loss"] / sums["batches"],
            "task": sums["task"] / sums["batches"],
            "top1": top1,  # of the training-side images that are held out
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": spent,
            "eta": spent * (self.updates / self.update - 1),
            "images": self.update * self.recipe.batch * self.recipe.accumulate,
        }
        self.curve.append(facts)
        (report or _log)(facts)

    @torch.no_grad()
    def accuracy(self, workload: Workload) -> float:
        """Top-1 of what the result would be now, at the full reduction, in float32."""
        model: nn.Module = self.model if self.ema is None else self.ema.module
        self.keep.finish()
        model.eval()
        correct = 0
        for start in range(0, len(workload), _EVALUATED_AT_ONCE):
            stop = min(start + _EVALUATED_AT_ONCE, len(workload))
            labels = torch.from_numpy(workload.labels[start:stop].copy()).to(self.device)
            correct += int((logits_of(model(workload.batch(start, stop).to(self.device))).argmax(1) == labels).sum())
        self.model.train()
        return correct / len(workload)

    def _no_sums(self) -> dict[str, Tensor]:
        """Of the losses since the epoch began; on the device, so that no update waits for them."""
        return {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in ("loss", "task", "batches")}

    def _refuse_divergence(self) -> None:
        if not bool(torch.isfinite(self._sums["loss"])):
            raise FinetuneError(
                f"the loss is not finite after update {self.update} of {self.updates}: lower lr, add warmup or clip, "
                "or use amp none"
            )

    @property
    def attention(self) -> Attention:
        """How sizes come into attention here: on a CPU, and in float32, as a mask whatever was chosen."""
        half = self.device.type == "cuda" and self.arithmetic.precision != "float32"
        return self.arithmetic.attention if half else "mask"

    def spent(self) -> float:
        """Seconds of training so far, those before a restart included."""
        return self.seconds + time.monotonic() - self._begun


def _log(facts: Mapping[str, Any]) -> None:
    top1 = "" if facts["top1"] is None else f", held-out training images {100 * facts['top1']:.1f} %"
    log.info(
        "epoch %d of %d: loss %.4f%s, %.0f s, %.0f s to go", facts["epoch"], facts["epochs"], facts["loss"], top1,
        facts["seconds"], facts["eta"],
    )  # fmt: skip


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
