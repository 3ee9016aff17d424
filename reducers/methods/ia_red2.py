"""IA-RED²: interpreters that are rewarded for discarding patches (Pan et al., NeurIPS 2021).

There is no public code: what is said here of the method rests on memory of the paper [R] unless marked otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reducers.checks import checked_share, checked_weight
from reducers.decision import Decision
from reducers.hosts import host_of
from reducers.maps import keep_patches
from reducers.placement import Placement
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.runtime.driver import ReducedViT
from reducers.signals import Signals

_SURE = 1e-6  # no probability is nearer to 0 or 1 than this: its logarithm stays finite


class Interpreter(nn.Module):
    """How informative a token is: the mean over heads of sigmoid(F_q(x) . F_k(p) / sqrt(d)), p a learned policy token.

    The division by sqrt(d) is our decision [D], and so is p's start, as small as timm's class tokens.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.policy = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T,) in (0, 1), at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        query = self.query(x).to(wide).unflatten(1, (self.heads, -1))
        key = self.key(self.policy).to(wide).unflatten(0, (self.heads, -1))
        return ((query * key).sum(2) * key.shape[1] ** -0.5).sigmoid().mean(1)

    def macs(self, tokens: Tensor) -> Tensor:
        """Multiply-adds of ``forward``, the policy token's key included."""
        width = self.policy.numel()
        return tokens.double() * (width * width + width) + width * width


@dataclass(frozen=True)
class Phase:
    """Where a training stands: at which group, and whether its interpreter learns or the blocks from it on."""

    group: int
    interpreter: bool


@dataclass(frozen=True)
class Draw:
    """What was drawn for one batch, (B,) each: its log probability,
    and the shares of patches that it and the greedy decision keep.
    """

    log_probability: Tensor
    kept: Tensor
    greedy: Tensor


def phase_at(share: float, *, groups: int, interpreter_share: float) -> Phase:
    """The phase after ``share`` of the training: groups one after the other, of each first the interpreter."""
    group = min(int(share * groups), groups - 1)
    return Phase(group, share * groups - group < interpreter_share)


def log_probability(drawn: Tensor, probability: Tensor, valid: Tensor) -> Tensor:
    """The log probability of a decision about each patch, drawn independently. All (B, N) -> (B,)"""
    p = probability.clamp(_SURE, 1 - _SURE)
    return torch.where(drawn, p.log(), (1 - p).log()).masked_fill(~valid, 0).sum(1)


def reward(kept: Tensor, right: Tensor, *, penalty: float) -> Tensor:
    """1 - (share kept)^2 where the prediction is right, else -penalty. kept, right: (B,) -> (B,)"""
    return torch.where(right, 1 - kept.square(), torch.full_like(kept, -penalty))


def at_least_one(chosen: Tensor, score: Tensor, valid: Tensor) -> Tensor:
    """Where no patch is chosen, the one of highest score; ties go to the lower index. All (B, N)"""
    chosen = chosen & valid
    best = torch.zeros_like(chosen).scatter_(1, score.masked_fill(~valid, -1).argmax(1, keepdim=True), 1)
    return chosen | (best & valid & ~chosen.any(1, keepdim=True))


@register("ia_red2")
class IARED2(TokenReducer):
    """At the start of each group of blocks an interpreter scores the patches; those below ``threshold`` are discarded.

    Placed at blocks 0, 4 and 8 as published, by one instance. The count differs from image to image; of an image that
    would lose all, the patch of highest score stays. Acts before the block.

    Training is a curriculum over the groups. First a group's interpreter learns by REINFORCE, the model standing still:
    decisions are drawn from its probabilities, the reward is 1 - (share kept)^2 for a right prediction and ``-penalty``
    for a wrong one, less the reward of the greedy decision. Then the blocks from there on learn by cross-entropy, under
    greedy decisions [D]. Groups whose turn has not come discard nothing. The greedy decision's prediction takes a
    second pass without gradients, with this method alone: what is placed beside it changes the baseline, and so the
    variance of the gradient, but not its mean. Images should not be mixed in training; where they are, a prediction
    counts as right for the larger part.

    Args:
        threshold: patches of lower probability are discarded; 0 keeps everything.
        penalty: for a wrong prediction; the published value is not known: 1 [D].
        interpreter_share: of a group's time that is the interpreter's: 10 of 30 epochs.
    """

    summary = "discard what a rewarded interpreter finds uninformative"
    source = "Pan et al., NeurIPS 2021 (arXiv 2106.12620)"
    traits = Traits(adaptive=True, trained=True, site="input")
    schedule: ClassVar[Mapping[str, Any]] = {"mixup": 0.0, "cutmix": 0.0}
    trained_as = (
        "from DeiT, group after group, 30 epochs each: 10 for the interpreter by REINFORCE, 20 for the blocks from "
        "there on by cross-entropy; no teacher [R]"
    )

    def __init__(self, *, threshold: float = 0.5, penalty: float = 1.0, interpreter_share: float = 1 / 3) -> None:
        super().__init__()
        self.threshold = checked_share(threshold, "IARED2(threshold=…)")
        self.penalty = checked_weight(penalty, "IARED2(penalty=…)")
        self.interpreter_share = checked_share(interpreter_share, "IARED2(interpreter_share=…)")
        self.interpreters = nn.ModuleDict()
        self._phase: Phase | None = None

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """An interpreter for each group."""
        for block in blocks:
            self.interpreters[str(block)] = Interpreter(host.width, host.heads)

    @property
    def groups(self) -> list[int]:
        """The first block of each group."""
        return [int(block) for block in self.interpreters]

    def train_phase(self, share: float, base: nn.Module) -> None:
        """Choose who learns: one interpreter, or the blocks from its group on."""
        groups = self.groups
        phase = self._phase = phase_at(share, groups=len(groups), interpreter_share=self.interpreter_share)
        base.requires_grad_(False)
        if not phase.interpreter:
            for module in host_of(base).behind(groups[phase.group]):
                module.requires_grad_(True)
        for group, interpreter in enumerate(self.interpreters.values()):
            interpreter.requires_grad_(phase.interpreter and group == phase.group)

    @torch.no_grad()
    def plan_training(self, images: Tensor, host: Any) -> Tensor | None:
        """(B,) the class that the model predicts after the greedy decision, while a draw is to be compared with it."""
        if self._phase is None or not self._phase.interpreter:
            return None
        greedy = copy.copy(self)  # shares every parameter
        greedy._phase = Phase(self._phase.group, interpreter=False)
        return ReducedViT(host.model, Placement(dict.fromkeys(self.groups, greedy)))(images).argmax(1)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, group = signals.layout, self.groups.index(state.block)
        phase = self._phase if state.training else None
        if phase is not None and group > phase.group:
            return None
        if layout.valid_patches.shape[1] == 0:
            return None
        interpreter = self.interpreters[str(state.block)]
        assert isinstance(interpreter, Interpreter)
        learns = phase is not None and phase.interpreter and group == phase.group
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            score = layout.pad_patches(interpreter(signals.output().detach()))
        if signals.counting:
            signals.spend(interpreter.macs(layout.lengths))
        valid, known = layout.valid_patches, score.detach()
        greedy = at_least_one(known >= self.threshold, known, valid)
        if not learns:
            return Decision(keep_patches(layout, greedy))
        drawn = torch.rand_like(known) < known
        kept = at_least_one(drawn, known, valid)
        patches = layout.patches.clamp(min=1)
        state.note(
            self, Draw(log_probability(drawn, score, valid), kept.sum(1) / patches, greedy.sum(1) / patches)
        )  # fmt: skip
        return Decision(keep_patches(layout, kept))

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """REINFORCE for the group whose interpreter learns; nothing while none does."""
        draws: list[Draw] = state.noted(self)
        if not draws:
            return {}
        (draw,) = draws
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        ours = reward(draw.kept, outputs.logits.argmax(1) == labels, penalty=self.penalty)
        greedy = reward(draw.greedy, state.plans[self] == labels, penalty=self.penalty)
        return {"policy": -((ours - greedy) * draw.log_probability).mean()}
