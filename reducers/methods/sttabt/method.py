"""STTABT: tokens chosen before the model runs, by attention traced back through a small network that guesses it
(Lee et al., ICLR 2023). With the model's own maps in place of the guess it is ``back_tracking``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_number, checked_share, checked_weight, checked_whole
from reducers.decision import Decision, advance
from reducers.kit.back_tracking import back_track
from reducers.maps import Keep
from reducers.methods.sttabt.approx_net import ApproxNet, Dense, Guess, Mimicry, watch
from reducers.methods.sttabt.concrete_masks import MIXING, concrete_masks, masked_block
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.runtime.block import run_block
from reducers.signals import Signals
from reducers.tokens import Layout, TokenBatch


@dataclass(frozen=True)
class Plan:
    """What was planned for one batch."""

    first: int  # the block that the masks begin with
    prefix: int
    masks: list[Tensor]  # (B, T) of each block's input, and of the last one's output: bool, or soft where they learn
    guess: Guess
    dense: Dense | None = None  # while ApproxNet is distilled

    @property
    def soft(self) -> bool:
        return self.masks[0].dtype != torch.bool

    def rows(self, block: int, batch: TokenBatch) -> Tensor:
        """The mask at a block's input for the tokens at hand, (T,); prefix tokens and what is no one patch's stay."""
        mask = self.masks[block - self.first][:, self.prefix :]
        assert batch.pos is not None  # uses_positions
        of_patch = mask[batch.layout.row_image, batch.pos.clamp(min=0)]
        return torch.where(batch.pos < 0, torch.ones_like(of_patch), of_patch)


def keep_nested(layout: Layout, chosen: list[Tensor]) -> list[Keep]:
    """One gather after the other, each (T,) of ``chosen`` holding where the next does; prefix tokens are in all.

    The counts of all of them are read from the device at once.
    """
    lengths = [layout.sum_rows(rows.long()) for rows in chosen]
    *counts, leads = torch.stack([*lengths, layout.prefix]).tolist()
    keeps: list[Keep] = []
    for rows, length, count in zip(chosen, lengths, counts, strict=True):
        for before in keeps:
            rows = before.apply(rows)
        total = sum(count)
        uniform = (total, leads[0]) if len(count) == 1 else None
        new = Layout(length, layout.prefix, total, uniform, (count, leads))
        keeps.append(Keep(keeps[-1].new if keeps else layout, new, rows.nonzero_static(size=total).squeeze(1)))
    return keeps


class _Update(TokenReducer):
    """Carries out a decision that was made before."""

    name = "update"

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self._decision = decision

    def decide(self, signals: Signals, state: State) -> Decision:
        return self._decision


@register("sttabt")
class STTABT(TokenReducer):
    """Trace importance back from the output through guessed attention, before the model runs, and skip the rest.

    A small network (ApproxNet: the model's depth and heads, narrower) guesses the attention of every block. From the
    prefix tokens at the output backwards it follows which tokens block i must read, M_i, and which it must update,
    M_i+1; each set holds the next. Block i computes keys and values for the ones, everything else for the others.
    Published in every block; where it is placed at some, it acts at those. Several prefix tokens all count as the
    output [D]. Where the head reads patches, those that the last block must read are updated in it [D].

    Without a budget (the paper's main form) a token is kept where its importance exceeds a threshold that each block
    learns: the count differs from image to image and block to block.

    Training: first ApproxNet learns from the model, which stands still and runs as in inference; then model, thresholds
    and ApproxNet learn together, under soft masks (with a budget: the model alone, on the tokens that stay).

    Args:
        budget: the hard form: so many patches of highest importance join the set at each block; ``Ratio`` rounds up.
        operating_point: p_logit at the start, to which a loss holds it; about sigmoid of it of the tokens stay: -3 to
            1, one training each.
        shrink: ApproxNet is so many times narrower.
        distillation: share of the training in which ApproxNet alone learns: 30 of 50 epochs.
        hidden: published weight of the distance between ApproxNet's features and the model's, while ApproxNet learns
            alone.
        prediction: published weight of the distance between their class probabilities, likewise.
        teacher: published weight of KL(teacher || student) of the logits; the teacher is the dense model.
        threshold: published weight of the thresholds' squared distance from the operating point.
        occupancy: published weight of the squared error of the share kept, the mean of the masks over blocks, images
            and tokens.
    """

    summary = "keep what guessed attention, traced back from the output, will read"
    source = "Lee et al., ICLR 2023 (STTABT)"
    traits = Traits(
        adaptive=True, trained=True, needs_class_token=True, needs_teacher=True, uses_positions=True,
        needs_token_keys=True,
        inputs=("images",),
    )  # fmt: skip
    scheduled_as = None
    budgets = ("count", "ratio")
    schedule: ClassVar[Mapping[str, Any]] = {"reducer_lr_scale": 10.0}
    trained_as = (
        "ApproxNet 30 epochs by distillation, AdamW lr 1e-4 without weight decay; then all 20 epochs, 14 of them "
        "warm-up, lr 1e-5 to 5e-7, weight decay 0.05, batch 512; teacher: the plain model"
    )

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        operating_point: float = -1.0,
        shrink: int = 4,
        distillation: float = 0.6,
        hidden: float = 0.01,
        prediction: float = 200.0,
        teacher: float = 0.5,
        threshold: float = 1e-3,
        occupancy: float = 1e-3,
    ) -> None:
        super().__init__()
        self.budget = None if budget is None else checked_budget(budget, "STTABT")
        self.operating_point = checked_number(operating_point, "STTABT(operating_point=…)")
        self.shrink = checked_whole(shrink, "STTABT(shrink=…)", least=1)
        self.distillation = checked_share(distillation, "STTABT(distillation=…)")
        self.hidden = checked_weight(hidden, "STTABT(hidden=…)")
        self.prediction = checked_weight(prediction, "STTABT(prediction=…)")
        self.teacher = checked_weight(teacher, "STTABT(teacher=…)")
        self.threshold = checked_weight(threshold, "STTABT(threshold=…)")
        self.occupancy = checked_weight(occupancy, "STTABT(occupancy=…)")
        self._blocks: tuple[int, ...] = ()
        self._distilling = False

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """ApproxNet, the maps that its distillation needs, and a threshold for each block from the first on."""
        self._blocks = blocks
        self.approx = ApproxNet(host, shrink=self.shrink)
        self.mimicry = Mimicry(self.approx.width, host.width, host.depth - host.embedded)
        if self.budget is None:
            self.thresholds = nn.Parameter(torch.full((host.depth - blocks[0],), float(self.operating_point)))

    def train_phase(self, share: float, base: nn.Module) -> None:
        """First ApproxNet is distilled, the model standing still; then the masks are learned."""
        self._distilling = share < self.distillation
        base.requires_grad_(not self._distilling)

    def plan(self, images: Tensor, host: Any) -> Plan:
        """The masks of all blocks from the first on, before any of them runs."""
        self.approx.check_grid(host.grid_of(images))  # before it cuts off what the model would pad
        distilling = self.training and self._distilling
        soft = self.training and not distilling and self.budget is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and (distilling or soft)):
            guess = self.approx(images, whole=distilling)
        dense = watch(host, images) if distilling else None
        exactly = torch.autocast(images.device.type, enabled=False)
        with exactly, torch.set_grad_enabled(torch.is_grad_enabled() and soft):
            masks = self._masks(guess, host)
        if not host.reads_prefix_alone:
            masks[-1] = masks[-2]
        self._book(host, images.shape[0], len(masks) - 1)
        return Plan(self._blocks[0], host.prefix, masks if soft else [mask >= 0.5 for mask in masks], guess, dense)

    def _masks(self, guess: Guess, host: Any) -> list[Tensor]:
        scores = guess.scores[self._blocks[0] - host.embedded :]
        if self.budget is None:
            return concrete_masks(scores, self.thresholds, prefix=host.prefix)
        count = self.budget.count(host.patches, initial=host.patches, prefix=host.prefix, rounding="ceil")
        maps = [found.softmax(-1).mean(1) for found in scores]
        return [mask.to(maps[0].dtype) for mask in back_track(maps, prefix=host.prefix, count=count, mixing=MIXING)]

    def _book(self, host: Any, images: int, steps: int) -> None:
        """The multiply-adds of planning: ApproxNet, and at each step back a row times a map."""
        tokens = host.prefix + host.patches
        macs = self.approx.macs() + ((steps - 1) * tokens + host.prefix) * tokens
        host.spend(torch.full((images,), float(macs), dtype=torch.float64, device=host.like.device))

    def block(self, block: Any, batch: TokenBatch, state: State) -> TokenBatch:
        """A block that reads some of the tokens and updates fewer."""
        plan: Plan = state.plans[self]
        return self._masked(block, batch, state, plan) if plan.soft else self._gathered(block, batch, state, plan)

    def _gathered(self, block: Any, batch: TokenBatch, state: State, plan: Plan) -> TokenBatch:
        tracer, layout = state.tracer, batch.layout
        needed = [plan.rows(state.block + 1, batch)]
        if state.block - 1 not in self._blocks:  # else the block before has left just the tokens to read
            needed.insert(0, plan.rows(state.block, batch))
        *read, update = keep_nested(layout, needed)
        for cut in read:
            batch = advance(batch, Decision(cut))
        after = run_block(block, batch, _Update(Decision(update)), state, None)
        if tracer is not None:
            entering, leaving = batch.layout.lengths, update.new.lengths
            tracer.cost.both(block.cost.macs(queries=leaving, keys=entering, outputs=leaving, mlp=leaving))
        return after

    def _masked(self, block: Any, batch: TokenBatch, state: State, plan: Plan) -> TokenBatch:
        """All tokens stay; ``alive`` hides those that are not updated from blocks that this method is not placed at."""
        read, write = plan.rows(state.block, batch), plan.rows(state.block + 1, batch)
        if batch.alive is not None:
            read = torch.minimum(read, batch.alive)
        if state.tracer is not None:
            rows = batch.layout.lengths
            state.tracer.cost.both(block.cost.macs(queries=rows, keys=rows, outputs=rows, mlp=rows))
        return replace(batch, x=masked_block(block, batch, read, write), alive=write)

    def finish(self, batch: TokenBatch, state: State) -> TokenBatch:
        """Under soft masks: an attention pool weighs tokens by what is left of them, as others do by ``alive``."""
        plan: Plan = state.plans[self]
        if not plan.soft:
            return batch
        left = plan.rows(self._blocks[-1] + 1, batch)
        bias = left.clamp(min=torch.finfo(left.dtype).tiny).log()
        return replace(batch, key_bias=bias if batch.key_bias is None else batch.key_bias + bias)

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """ApproxNet's distillation; after it the teacher's word, and what holds the thresholds at the operating point.

        The occupancy is the mean of the masks over blocks, images and tokens.
        """
        plan: Plan = state.plans[self]
        if plan.dense is not None:
            parts: dict[str, Tensor] = self.mimicry(
                plan.guess, plan.dense, hidden=self.hidden, prediction=self.prediction
            )
            return parts
        student, known = outputs.logits.float().log_softmax(1), teacher.logits.float().log_softmax(1)
        parts = {"teacher": self.teacher * F.kl_div(student, known, reduction="batchmean", log_target=True)}
        if plan.soft:
            share = torch.stack([mask.mean() for mask in plan.masks[:-1]]).mean()
            asked = 1 / (1 + math.exp(-max(self.operating_point, -700.0)))
            parts["thresholds"] = self.threshold * (self.thresholds - self.operating_point).square().sum()
            parts["occupancy"] = self.occupancy * (share - asked).square()
        return parts
