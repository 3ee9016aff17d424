"""What a training minimises: the task, the dense teacher where one is asked, and the losses that reducers name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.answers import logits_of
from ablations.trial.recipe import Distillation, Recipe
from reducers import Placement, TokenReducer
from reducers.reducer import HasLosses, State
from reducers.runtime.driver import ReducedViT
from reducers.runtime.fold import Attention
from reducers.tokens import TokenBatch


@dataclass(frozen=True)
class Outputs:
    """What a reducer's ``losses`` may know of the model it reduces."""

    logits: Tensor  # (B, classes)
    batch: TokenBatch  # the tokens that leave the last block, before the final norm
    norm: nn.Module  # that final norm, under which tokens are comparable to the teacher's


@dataclass(frozen=True)
class TeacherOutputs:
    """The dense teacher on the same images, without gradients."""

    logits: Tensor  # (B, classes)
    tokens: Tensor  # (B, N, D) after the final norm


class _Witness(TokenReducer):
    """Stands behind the last block, changes nothing, and remembers the state that reducers' losses read."""

    name = "witness"

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[TokenBatch, State] | None = None

    def finish(self, batch: TokenBatch, state: State) -> TokenBatch:
        self.seen = batch, state
        return batch


class TrainingViT(ReducedViT):
    """A reduced model that also says what its reducers' losses need: the final tokens and the final state."""

    def __init__(
        self,
        base: nn.Module,
        placement: Placement,
        *,
        host: Mapping[str, str] | None = None,
        attention: Attention = "mask",
    ) -> None:
        super().__init__(base, placement, host=host, attention=attention)
        self._witness = [_Witness()]  # in a list: no part of the model, so it has no place in its state

    def members(self) -> list[TokenReducer]:
        return [*super().members(), *self._witness]

    def reducing(self) -> list[TokenReducer]:
        """The reducers as they were placed."""
        return super().members()

    def losing(self) -> list[TokenReducer]:
        """The reducers that have losses of their own."""
        return [member for member in super().members() if member.steps.has_losses]

    def observed(self, images: Tensor) -> tuple[Outputs, State]:
        """A forward pass, with what it left behind."""
        (witness,) = self._witness
        logits = logits_of(self(images))
        assert witness.seen is not None
        batch, state = witness.seen
        witness.seen = None  # it holds the whole graph
        return Outputs(logits, batch, self.host.final_norm), state


class Objective:
    """The loss of a batch, as named parts that add up."""

    def __init__(self, recipe: Recipe, teacher: nn.Module | None, *, classes: int) -> None:
        self.distill: Distillation | None = recipe.distill
        self.teacher = teacher
        self.mixup = _mixup(recipe, classes) if recipe.mixes else None
        self._soft = SoftTargetCrossEntropy()
        self._hard: nn.Module = (
            LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing > 0 else nn.CrossEntropyLoss()
        )

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets as the model sees them: (B,) labels, or (B, classes) where images are mixed."""
        if self.mixup is None:
            return images, labels
        mixed: tuple[Tensor, Tensor] = self.mixup(images, labels)
        return mixed

    def parts(self, model: TrainingViT, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Every named part of the loss, already weighted."""
        outputs, state = model.observed(images)
        logits = outputs.logits.float()
        task = self._soft(logits, targets) if targets.ndim == 2 else self._hard(logits, targets)
        parts: dict[str, Tensor] = {"task": task}
        teacher = None if self.teacher is None else teach(self.teacher, images)
        if self.distill is not None:
            assert teacher is not None
            alpha, tau = self.distill.alpha, self.distill.tau
            parts["task"] = (1 - alpha) * task
            parts["distill"] = alpha * softened_divergence(logits, teacher.logits.float(), tau=tau)
        for member in model.losing():
            for name, value in cast(HasLosses, member).losses(state, outputs, targets, teacher).items():
                label = f"{member.name}.{name}"
                parts[label] = parts[label] + value if label in parts else value
        return parts


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor) -> TeacherOutputs:
    """The teacher's tokens and logits."""
    dense: Any = teacher
    tokens = dense.forward_features(images)
    return TeacherOutputs(dense.forward_head(tokens), tokens)


def softened_divergence(student: Tensor, teacher: Tensor, *, tau: float) -> Tensor:
    """tau^2 KL(teacher || student) of the softened distributions, mean over images; tau^2 keeps the gradient's size."""
    divergence = F.kl_div(
        F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1), reduction="batchmean", log_target=True
    )
    return tau**2 * divergence


def needs_teacher(model: TrainingViT, recipe: Recipe) -> bool:
    """Whether anything asks what the dense model says; reducers do by their traits."""
    return recipe.distill is not None or any(member.traits.needs_teacher for member in model.losing())


def _mixup(recipe: Recipe, classes: int) -> Mixup:
    return Mixup(
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes
    )
