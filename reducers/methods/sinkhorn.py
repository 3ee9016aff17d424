"""Sinkhorn: patches are transported onto M learned prototypes (Haurum et al., ICCVW 2023).

Entropic optimal transport between tokens and prototypes, by cosine similarity; the plan mixes the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.budget import Budget
from reducers.checks import checked_weight, checked_whole
from reducers.kit.learned_pooling import LearnedPooling, Pooler
from reducers.registry import register


def transport_plan(scores: Tensor, valid: Tensor, *, iterations: int) -> Tensor:
    """Sinkhorn's iterations in the logarithm: rows, then columns are scaled to the uniform marginals, (B, M, N).

    scores (B, M, N): similarity over the regularisation; valid (B, N). The columns come last, so that each token's
    weights over the prototypes sum to 1 exactly; those of a prototype over the tokens sum to about N / M. The published
    marginals are 1 / (M + N) each, and the plan is multiplied by M + N at the end: both cancel, and are left out.
    """
    closed = ~valid[:, None]
    column = torch.zeros_like(scores[:, :1])
    row = torch.zeros_like(scores[:, :, :1])
    for _ in range(iterations):
        open_scores = (scores + column).masked_fill(closed, torch.finfo(scores.dtype).min)
        row = -open_scores.logsumexp(dim=2, keepdim=True)
        column = -(scores + row).logsumexp(dim=1, keepdim=True)
    return (scores + row + column).exp().masked_fill(closed, 0)


class Prototypes(Pooler):
    """Prototypes (M, D) of length 1, and the transport of normed tokens onto them."""

    def __init__(self, width: int, count: int, *, epsilon: float, iterations: int) -> None:
        super().__init__(count)
        self.epsilon, self.iterations = epsilon, iterations
        self.prototypes = nn.Parameter(F.normalize(torch.randn(count, width), dim=1))

    def forward(self, x: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(x.to(wide), dim=2)
            scores = F.normalize(self.prototypes.to(wide), dim=1) @ unit.transpose(1, 2)
            plan = transport_plan(scores / self.epsilon, valid, iterations=self.iterations)
            return plan, plan @ unit

    def macs(self, patches: Tensor) -> Tensor:
        return 2 * patches * self.prototypes.numel()  # similarities, mix


@register("sinkhorn")
class Sinkhorn(LearnedPooling):
    """Replace the patch tokens by M mixes of them: the plan that transports tokens onto learned prototypes.

    Similarity is the cosine. The tokens that are mixed are those of length 1, and no scale is put back, as published.
    Prototypes start from a normal distribution and have length 1: the authors shorten them in every forward pass, here
    the pass reads them so and changes nothing, and they are shortened before each update [D]. Every patch is shared out
    whole, so sizes add up to the number of patches. Acts before the block; the count is fixed. It cannot be the
    identity and works only after training.

    Args:
        budget: M, counted from the patches that enter the model, whatever enters the block; an image with no more than
            that is left as it is [D]. ``Ratio`` rounds down.
        epsilon: of the entropic regularisation.
        iterations: of Sinkhorn's scaling.
    """

    summary = "optimal transport of the patches onto learned prototypes"
    source = "Haurum et al., ICCVW 2023 (arXiv 2308.04657)"
    trained_as = "by the task loss: 30 epochs from DeiT, learning rate 1e-3 at a batch of 1024, 20 of them warm-up"

    def __init__(self, budget: Budget, *, epsilon: float = 1.0, iterations: int = 3) -> None:
        super().__init__(budget)
        self.epsilon = checked_weight(epsilon, "Sinkhorn(epsilon=…)", above=True)
        self.iterations = checked_whole(iterations, "Sinkhorn(iterations=…)", least=1)

    def pooler(self, width: int, count: int) -> Prototypes:
        return Prototypes(width, count, epsilon=self.epsilon, iterations=self.iterations)

    @torch.no_grad()
    def train_phase(self, share: float, base: nn.Module) -> None:
        """Put the prototypes back to length 1."""
        for pooler in self.poolers.values():
            assert isinstance(pooler, Prototypes)
            pooler.prototypes.copy_(F.normalize(pooler.prototypes, dim=1))
