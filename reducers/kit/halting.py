"""Halting token by token: the sums that A-ViT keeps in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from reducers.errors import ReducerError
from reducers.maps import Keep
from reducers.signals import Signals
from reducers.tokens import Layout


def halting_score(x: Tensor, *, gamma: float, beta: float) -> Tensor:
    """sigmoid(gamma x_0 + beta) of features (T, D), in float32 at least: (T,)"""
    return torch.sigmoid(gamma * x[:, 0].to(torch.promote_types(x.dtype, torch.float32)) + beta)


class Halted(NamedTuple):
    """One step of the halting of tokens (T,)."""

    weight: Tensor  # of these features in the token's output; 0 for tokens that had halted before
    cumulated: Tensor  # c: sum of scores
    remainder: Tensor  # R: 1 - that sum, as it was before the step in which the token halted
    running: Tensor  # bool: has not halted
    over: Tensor  # R where the token halts in this step, else 0: its part of the ponder cost


def halt(cumulated: Tensor, remainder: Tensor, running: Tensor, score: Tensor, *, epsilon: float) -> Halted:
    """Add a score (T,) to the running tokens; who reaches 1 - epsilon halts and gives the remainder as last weight.

    A sum of exactly 1 - epsilon has reached it. So the weights of a token sum to 1 when it halts.
    """
    cumulated = torch.where(running, cumulated + score, cumulated)
    halts = running & (cumulated >= 1 - epsilon)
    goes_on = running & ~halts
    none = torch.zeros_like(remainder)
    over = torch.where(halts, remainder, none)
    weight = torch.where(goes_on, score, over)
    return Halted(weight, cumulated, remainder - torch.where(goes_on, score, none), goes_on, over)


@dataclass(frozen=True)
class Rule:
    """How tokens of one model halt."""

    gamma: float
    beta: float
    epsilon: float
    prefix: int  # prefix tokens of an image as it enters the model
    read: int | None  # how many of them, the first, the head reads; None: it reads the patches


@dataclass(eq=False)
class Sums:
    """What has been added up so far in one forward pass.

    It begins with the tokens that enter the first block the method is placed at: their home. Of those still there the
    sums are packed (T,); outputs are held only for the tokens the head reads.
    """

    rule: Rule
    home: Layout
    size: Tensor  # (T0,) at home
    cls: Tensor  # (B,) at home
    layout: Layout  # of the tokens still there
    cumulated: Tensor  # (T,)
    remainder: Tensor  # (T,)
    running: Tensor  # (T,) bool
    rows: Tensor  # (R,) where each token that is read is now, -1 = removed
    output: Tensor  # (R, D) what they have given so far
    ponder: Tensor  # sum over all tokens of blocks passed + remainder
    last: int = -1  # the last block that was scored
    scores: list[tuple[int, Tensor]] = field(default_factory=list)  # block, mean score over the patches of all images

    @classmethod
    def begin(cls, rule: Rule, signals: Signals) -> Sums:
        """Nothing added up yet for the tokens that are there."""
        layout, x = signals.layout, signals.output()
        if rule.read is not None and layout.lead != rule.prefix:
            raise ReducerError(
                "avit hands the class token's output to the head, and another reducer may have dropped that token "
                "before; keep it there (keep_class_token=True)"
            )
        rows = torch.arange(layout.rows, device=x.device)
        if rule.read is not None:
            rows = (layout.starts[:, None] + torch.arange(rule.read, device=x.device)).flatten()
        wide = torch.promote_types(x.dtype, torch.float32)
        zeros = torch.zeros(layout.rows, dtype=wide, device=x.device)
        output = torch.zeros(rows.shape[0], x.shape[1], dtype=wide, device=x.device)
        return cls(
            rule, layout, signals.size, signals.cls, layout, cumulated=zeros, remainder=zeros + 1, running=zeros == 0,
            rows=rows, output=output, ponder=zeros.sum(),
        )  # fmt: skip

    def check(self, layout: Layout) -> None:
        """The tokens must be those that this method left."""
        if layout is not self.layout:
            raise ReducerError(
                "avit adds up scores token by token, and another reducer changed the tokens after its first block; "
                "place the other one before that block"
            )

    def step(self, block: int, x: Tensor, *, final: bool = False) -> None:
        """Add the scores of the features (T, D) that left ``block``; after the ``final`` one every token halts."""
        score = halting_score(x, gamma=self.rule.gamma, beta=self.rule.beta)
        none = torch.zeros_like(score)
        mean = torch.where(self.running & ~self.layout.is_prefix, score, none).sum() / self.home.patches.sum().clamp(
            min=1
        )
        self.scores.append((block, mean))
        passed = self.running.sum() * (block - self.last)
        done = halt(
            self.cumulated, self.remainder, self.running, none + 1 if final else score, epsilon=self.rule.epsilon
        )
        self.cumulated, self.remainder, self.running = done.cumulated, done.remainder, done.running
        self.ponder = self.ponder + passed + done.over.sum()
        self.last = block
        if x.shape[0]:
            here = self.rows.clamp(min=0)
            weight = done.weight.index_select(0, here).masked_fill(self.rows < 0, 0)
            self.output = self.output + weight[:, None] * x.index_select(0, here)

    def stays(self, *, training: bool) -> Tensor:
        """(T,) bool: who enters the next block.

        Prefix tokens stay until their image is finished: until every token that the head reads has halted. In inference
        its patches go with them; in training each goes on to its own halt, which the losses ask for.
        """
        layout, read = self.layout, self.rule.read
        if read is None:
            finished = layout.sum_rows(self.running.long()) == 0
        else:
            halted = (self.rows < 0) | ~self.running.index_select(0, self.rows.clamp(min=0))
            finished = halted.view(layout.images, read).all(dim=1)
        unfinished = ~finished[layout.row_image]
        return torch.where(layout.is_prefix, unfinished, self.running if training else self.running & unfinished)

    def follow(self, kept: Keep) -> None:
        """Go on with the tokens that stay."""
        self.layout = kept.new
        self.cumulated, self.remainder = kept.apply(self.cumulated), kept.apply(self.remainder)
        self.running = kept.apply(self.running)
        self.rows = kept.destination[self.rows.clamp(min=0)].masked_fill(self.rows < 0, -1)

    def work(self) -> Tensor:
        """(B,) float64 multiply-adds of a step: the score of each token, and the sums of those that are read."""
        tokens = self.layout.lengths.double()
        read = tokens if self.rule.read is None else self.rule.read * (tokens > 0)
        return tokens + self.output.shape[1] * read


@dataclass(eq=False)
class Halting:
    """What ``AViT.plan`` makes for one forward pass; the sums come with the first tokens."""

    rule: Rule
    sums: Sums | None = None
