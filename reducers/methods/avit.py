"""A-ViT: every token adds up a halting score from block to block,
and leaves when the sum is full (Yin et al., CVPR 2022).

The score is read from feature 0 of what leaves a block. A token's output is the mean of what left each block it passed,
weighted by its scores: the class token's goes to the head, and when it halts its image is finished.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from reducers.checks import checked_choice, checked_flag, checked_number, checked_share, checked_weight, checked_whole
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.halting import Halting, Rule, Sums
from reducers.maps import keep_rows
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Layout, TokenBatch

Constants = Literal["released", "paper"]
_OR_PUBLISHED = "; None takes the published one"


def published_constants(constants: str, width: int) -> tuple[float, float]:
    """Scale gamma and bias beta of the halting score.

    ``released``: (10, -30) for DeiT-Ti, here widths up to 192, else (10, -75) of DeiT-S, which wider models start from
    [D: none is released]. ``paper``: (5, -10) [R].
    """
    if constants == "paper":
        return 5.0, -10.0
    return 10.0, -30.0 if width <= 192 else -75.0


def depth_prior(depth: int, target: int) -> Tensor:
    """Logarithm of the wanted halting distribution over ``depth`` blocks, (depth,) float64.

    The normal density of mean ``target`` and deviation 1, scaled so that the blocks before ``target`` have 0.98; the
    whole then sums to about 3.26 for 8 of 12 blocks, as in the authors' code.
    """
    log_density = -0.5 * (torch.arange(depth, dtype=torch.float64) - target) ** 2
    return log_density - log_density[:target].logsumexp(0) + math.log(0.98)


def prior_penalty(scores: Tensor, log_prior: Tensor, *, normalised: bool) -> Tensor:
    """How far the mean halting scores of the blocks (L,) are from the prior: sum t (log t - log p) / L, 0 if negative.

    p: the scores over their sum, from 0.01 to 0.99. ``normalised``: t sums to 1, so that p = t is the minimum; the
    authors' t does not.
    """
    log_prior = log_prior.to(device=scores.device, dtype=scores.dtype)
    if normalised:
        log_prior = log_prior.log_softmax(0)
    share = (scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)).clamp(0.01, 0.99)
    return (log_prior.exp() * (log_prior - share.log())).mean().clamp(min=0)


@register("avit")
class AViT(TokenReducer):
    """Let each token halt by itself: sigmoid(gamma x_0 + beta) adds up over the blocks, at 1 - ``epsilon`` it stops.

    Place it at blocks 1 to depth - 1: at block b it scores what left block b - 1; after the last block every token
    halts. At block 0 there is nothing to score. A block it is not placed at lets nobody halt. Halted tokens are
    removed; an image is finished when its class token halts, and has no tokens after that. Distilled models: when both
    tokens the head reads have halted; prefix tokens stay until then [D]. A head that reads the patches gets every
    token's output [D]; published is the class token's alone. A ``distill`` of the training makes it the distilled form.
    It takes no budget: what it keeps follows from the training. Without training the feature 0 means something else,
    and with a very low beta every token passes all blocks.

    Losses beside the task are the ponder loss, the mean over tokens of blocks passed + remainder, and the divergence of
    the blocks' mean scores from a normal distribution around a block. The mean score of a block is over the patches,
    halted ones counting 0 [D: the authors leave out one image and average the others' masked tokens too]. Training runs
    on the tokens that are there, as no gradient passes the halting. Other reducers may act before the first block it is
    placed at, not from there on.

    Args:
        constants: gamma and beta as ``released`` (10 and -30 for DeiT-Ti, -75 for wider models) or of the ``paper`` (5,
            -10) [R]; made for the feature 0 of those models.
        gamma: in place of the constants'.
        beta: in place of the constants'; one that is too low gives no gradient.
        epsilon: a token halts when its sum reaches 1 - epsilon.
        ponder: weight of the ponder loss.
        prior: weight of the divergence from the normal distribution.
        prior_depth: block around which that distribution lies.
        normalised: the normal distribution is made to sum to 1, so that its minimum is itself; the authors' does not.
    """

    summary = "each token halts when its halting scores add up to one"
    source = "Yin et al., CVPR 2022 (arXiv 2112.07658)"
    traits = Traits(adaptive=True, trained=True, site="input")
    trained_as = (
        "100 epochs from DeiT, a cosine with 5 epochs of warm-up, mixup and cutmix; learning rate 5e-4 (Ti, 512 images)"
        " or 3e-4 (S, 384 images) at DeiT's scaling by batch / 512"
    )

    def __init__(
        self,
        *,
        constants: Constants = "released",
        gamma: float | None = None,
        beta: float | None = None,
        epsilon: float = 0.01,
        ponder: float = 5e-4,
        prior: float = 1e-3,
        prior_depth: int = 8,
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.constants = checked_choice(constants, Constants, "AViT(constants=…)")
        self.gamma = None if gamma is None else checked_number(gamma, "AViT(gamma=…)", hint=_OR_PUBLISHED)
        self.beta = None if beta is None else checked_number(beta, "AViT(beta=…)", hint=_OR_PUBLISHED)
        self.epsilon = checked_share(epsilon, "AViT(epsilon=…)")
        self.ponder = checked_weight(ponder, "AViT(ponder=…)")
        self.prior = checked_weight(prior, "AViT(prior=…)")
        self.prior_depth = checked_whole(prior_depth, "AViT(prior_depth=…)", least=1)
        self.normalised = checked_flag(normalised, "AViT(normalised=…)")

    def plan(self, images: Tensor, host: Any) -> Halting:
        """Nothing added up yet."""
        gamma, beta = published_constants(self.constants, host.width)
        gamma, beta = gamma if self.gamma is None else self.gamma, beta if self.beta is None else self.beta
        return Halting(Rule(gamma, beta, self.epsilon, host.prefix, host.read_prefix))

    def decide(self, signals: Signals, state: State) -> Decision | None:
        if state.block == 0:
            return None
        halting: Halting = state.plans[self]
        layout, counting = signals.layout, signals.counting
        if halting.sums is None:
            halting.sums = Sums.begin(halting.rule, signals)
            if counting:
                signals.spend(halting.sums.work())
        sums = halting.sums
        sums.check(layout)
        sums.step(state.block - 1, signals.output())
        kept = keep_rows(layout, sums.stays(training=state.training)) if layout.rows else None
        if kept is not None and kept.new.rows == layout.rows:
            kept = None
        if kept is not None:
            sums.follow(kept)
        if counting:  # of the next step, which is on the tokens that stay
            signals.spend(sums.work())
        return None if kept is None else Decision(kept)

    def finish(self, batch: TokenBatch, state: State) -> TokenBatch:
        """The tokens the head reads, each the weighted mean of what left the blocks it passed."""
        sums = state.plans[self].sums
        if sums is None:  # it stood at block 0 alone
            return batch
        sums.check(batch.layout)
        sums.step(state.block - 1, batch.x, final=True)
        layout, size, rows = sums.home, sums.size, sums.cls
        if sums.rule.read is not None:
            layout = Layout.alike(layout.images, sums.rule.read, sums.rule.read, size.device)
            size, rows = size.new_ones(layout.rows), layout.starts
        elif batch.key_bias is not None:
            raise ReducerError(
                "avit gives every token's output to a head that reads the patches, and a merge before it weights "
                "attention by size; merge without that (proportional=False), or take a model whose head reads the "
                "class token"
            )
        x = sums.output.to(batch.x.dtype)
        return TokenBatch(x, layout, size, rows)

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """``ponder`` asks for few blocks, ``prior`` for halting around a depth."""
        sums = state.plans[self].sums
        parts: dict[str, Tensor] = {}
        if sums is None:
            return parts
        if self.ponder > 0:
            parts["ponder"] = self.ponder * sums.ponder / max(sums.home.rows, 1)
        if self.prior > 0:
            scores = torch.stack([score for _, score in sums.scores])
            log_prior = depth_prior(state.depth, self.prior_depth)[[block for block, _ in sums.scores]]
            parts["prior"] = self.prior * prior_penalty(scores, log_prior, normalised=self.normalised)
        return parts
