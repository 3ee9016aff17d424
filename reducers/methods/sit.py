"""SiT's token slimming: a small network mixes the patches into fewer,
and learns from the unslimmed model's (Zong et al., ECCV 2022).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.budget import Budget
from reducers.checks import checked_weight
from reducers.errors import ReducerError
from reducers.kit.learned_pooling import LearnedPooling, Pooler, softmax_over_tokens
from reducers.reducer import State
from reducers.registry import register


class Slimming(Pooler):
    """softmax over the tokens of s MLP(LN(x)), D -> D/2 -> M; the scale s is learned and starts at 1."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(count)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width // 2)
        self.out = nn.Linear(width // 2, count)
        self.scale = nn.Parameter(torch.ones(()))

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, N)"""
        logits = self.out(F.gelu(self.hidden(self.norm(x))))
        return (self.scale * logits).transpose(1, 2)

    def forward(self, x: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, None]:
        return softmax_over_tokens(self.logits(x), valid), None

    def macs(self, patches: Tensor) -> Tensor:
        mix = self.count * self.hidden.in_features
        return patches * (self.hidden.weight.numel() + self.out.weight.numel() + mix)


class Expansion(Slimming):
    """The reverse, for training alone: every original patch as a mix of the tokens that are left,
    then a linear layer.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count)
        self.project = nn.Linear(width, width)

    def recover(self, x: Tensor, valid: Tensor) -> Tensor:
        """Tokens leaving the last block (B, M, D), valid (B, M) -> what the teacher's patches may be, (B, N0, D)."""
        weights = softmax_over_tokens(self.logits(x), valid)
        return self.project(weights.to(x.dtype) @ self.norm(x))


@register("sit")
class SiT(LearnedPooling):
    """Replace the patch tokens by M mixes of them: softmax over the tokens of a learned scale times an MLP.

    The distillation that belongs to it [R]: a reverse module expands the final tokens back to the patches, and the loss
    is their mean squared distance from the dense model's normed ones. The authors match the tokens of every block; here
    it is the final ones, and the weight is ours [D]. The reverse module is in no forward pass and costs nothing in
    inference. Acts before the block; the count is fixed. It cannot be the identity and works only after training.

    Args:
        budget: M, counted from the patches that enter the model, whatever enters the block; an image with no more than
            that is left as it is [D]. ``Ratio`` rounds down.
        recalibration: weight of that distillation; 0: the task alone, no teacher.
    """

    summary = "an MLP mixes the patches into fewer (token slimming)"
    source = "Zong et al., ECCV 2022 (arXiv 2111.12624)"
    trained_as = "with the network, distilled from the unslimmed model; by Haurum et al. 30 epochs from DeiT"

    def __init__(self, budget: Budget, *, recalibration: float = 1.0) -> None:
        super().__init__(budget)
        self.recalibration = checked_weight(recalibration, "SiT(recalibration=…)")
        self.traits = replace(self.traits, needs_teacher=recalibration > 0)

    def pooler(self, width: int, count: int) -> Slimming:
        return Slimming(width, count)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """A slimming at each block, and one reverse module for the final tokens."""
        super().attach(host, blocks)
        self._prefix = host.prefix
        if self.recalibration > 0:
            self.reverse = Expansion(host.width, host.patches)

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """``recalibration``: how far the expanded tokens are from the dense model's patches."""
        if self.recalibration == 0:
            return {}
        layout = outputs.batch.layout
        recovered = self.reverse.recover(layout.pad_patches(outputs.batch.x), layout.valid_patches)
        wanted = teacher.tokens[:, self._prefix :]
        if wanted.shape[1] != recovered.shape[1]:
            raise ReducerError(
                f"sit expands to the {recovered.shape[1]} patches that the model was made for, and the teacher has "
                f"{wanted.shape[1]}; train on images of the model's own size, or with recalibration=0"
            )
        return {"recalibration": self.recalibration * F.mse_loss(recovered.float(), wanted.float())}
