"""DynamicViT: small predictors, trained with the model, say which patches to keep (Rao et al., NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from reducers.budget import Budget
from reducers.checks import checked_choice, checked_weight
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.keep_predictor import PredictedKeep, Stage, divergence
from reducers.maps import Keep, Mask
from reducers.reducer import State
from reducers.registry import register
from reducers.signals import Signals

Distance = Literal["mse", "kl"]


def token_distance(ours: Tensor, theirs: Tensor, counts: Tensor, *, distance: Distance) -> Tensor:
    """How far tokens (T, D) are from the teacher's, mean over those where ``counts`` (T,) bool holds; 0 if none does.

    ``mse``: mean squared difference of the features; ``kl``: divergence of their softmaxes.
    """
    if distance == "kl":
        apart = divergence(ours, theirs)
    else:
        wide = torch.promote_types(ours.dtype, torch.float32)
        apart = (ours.to(wide) - theirs.to(wide)).square().mean(dim=1)
    return (apart * counts).sum() / counts.sum().clamp(min=1)


@register("dynamicvit")
class DynamicViT(PredictedKeep):
    """Keep the patches that a learned predictor finds worth keeping; the rest are dropped before the block.

    Inference keeps a fixed number, as published: 137, 96 and 67 of 196 at a ratio of 0.7.

    Training decides each patch by itself, masks what is dropped (later attention multiplies a key's share by 0; every
    token still sees itself), and holds the mean share to the budget's. The teacher of its losses is the dense model.
    Without training the predictors are random, and so is the choice. An image of which a training pass drops every
    patch has a mean of 0 in the next predictor [D]. Trained alone, with one reducer at all its blocks.

    Args:
        budget: ``Ratio(rho)`` keeps floor(N rho^s) of the N patches at the s-th block it is placed at.
        threshold: keep every patch whose probability to be kept is above it (0.5: what training draws most often), at
            least one; then the number differs from image to image, and the budget is only what training aims at [D].
        ratio_weight: of the squared error of the kept share.
        distill_weight: of KL(teacher || student) of the logits.
        token_weight: of the distance of the surviving patches' final features from the teacher's.
        token_distance: ``mse`` as published for DeiT, or ``kl``.
    """

    summary = "learned predictors keep the patches worth keeping"
    source = "Rao et al., NeurIPS 2021 (arXiv 2106.02034)"
    trained_as = (
        "30 epochs from DeiT with the dense model as teacher; predictors at a learning rate of 1e-3 x batch / 1024, "
        "the model at a hundredth of it, standing still for the first 5 epochs [R]"
    )

    def __init__(
        self,
        budget: Budget,
        *,
        threshold: float | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_weight: float = 0.5,
        token_distance: Distance = "mse",
    ) -> None:
        super().__init__(budget, threshold=threshold, ratio_weight=ratio_weight, distill_weight=distill_weight)
        self.token_weight = checked_weight(token_weight, "DynamicViT(token_weight=…)")
        self.token_distance = checked_choice(token_distance, Distance, "DynamicViT(token_distance=…)")
        self.traits = replace(self.traits, needs_teacher=self.distill_weight > 0 or self.token_weight > 0)

    def dropped(self, signals: Signals, kept: Keep) -> Decision:
        return Decision(kept)

    def masked(self, signals: Signals, before: Tensor, keep: Tensor) -> Decision:
        return Decision(Mask.of(signals.layout, keep))  # the runtime multiplies it with the masks before

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """``ratio``, ``distill`` and ``tokens``."""
        parts = super().losses(state, outputs, targets, teacher)
        stages = state.noted(self)
        if self.token_weight > 0 and stages:
            parts["tokens"] = self.token_weight * self._tokens_apart(stages[-1], outputs, teacher.tokens)
        return parts

    def _tokens_apart(self, last: Stage, outputs: Any, theirs: Tensor) -> Tensor:
        layout = outputs.batch.layout
        if layout is not last.layout or layout.uniform is None or layout.uniform[0] != theirs.shape[1]:
            raise ReducerError(
                "DynamicViT compares each token with the teacher's, and another reducer removed some; set "
                "token_weight=0, or train without the other reducer"
            )
        counts = ~layout.is_prefix
        if last.alive is not None:
            counts = counts & (last.alive > 0.5)
        ours = outputs.norm(outputs.batch.x)
        return token_distance(ours, theirs.flatten(0, 1), counts, distance=self.token_distance)  # type: ignore[arg-type]
