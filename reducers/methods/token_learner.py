"""TokenLearner: a small network looks at the image and weighs its patches M times over (Ryoo et al., NeurIPS 2021)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.budget import Budget
from reducers.checks import checked_choice
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.learned_pooling import LearnedPooling, Pooler, softmax_over_tokens
from reducers.reducer import State
from reducers.registry import register
from reducers.signals import Signals

Maps = Literal["mlp", "conv"]

_BOTTLENECK = 64
_CONVOLUTIONS = 4  # [R]


class ByMLP(Pooler):
    """Version 1.1: softmax over the tokens of MLP(LN(x)), D -> 64 -> M."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(count)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, _BOTTLENECK)
        self.out = nn.Linear(_BOTTLENECK, count)

    def forward(self, x: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, None]:
        logits = self.out(F.gelu(self.hidden(self.norm(x))))
        return softmax_over_tokens(logits.transpose(1, 2), valid), None

    def macs(self, patches: Tensor) -> Tensor:
        mix = self.count * self.hidden.in_features
        return patches * (self.hidden.weight.numel() + self.out.weight.numel() + mix)


class ByConvolution(Pooler):
    """Version 1.0: sigmoid maps from 3 x 3 convolutions of LN(x) on the grid, and the mean over it.

    The map's weights are those of each new token over their sum, so that it stands for one, as after a softmax [D].
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__(count)
        self.norm = nn.LayerNorm(width)
        widths = [width] + [count] * _CONVOLUTIONS
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )

    def forward(self, x: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        maps = self.norm(x).transpose(1, 2).unflatten(2, grid)
        for number, convolution in enumerate(self.convolutions):
            maps = convolution(F.gelu(maps) if number else maps)
        maps = maps.flatten(2).to(torch.promote_types(maps.dtype, torch.float32)).sigmoid()
        tokens = (maps / x.shape[1]).to(x.dtype) @ x
        return maps / maps.sum(dim=2, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny), tokens

    def macs(self, patches: Tensor) -> Tensor:
        kernels = sum(kernel.numel() for kernel in self.convolutions.parameters())
        return patches * (kernels + self.count * self.norm.weight.numel())


@register("token_learner")
class TokenLearner(LearnedPooling):
    """Replace the patch tokens by M mixes of them, with weights that a small network reads off the tokens.

    Published: once, in the middle of the network, 8 tokens: ``at(6, TokenLearner(Count(8)))``. The optional fuser,
    which maps the tokens back to the patches, is left out: here tokens only become fewer. Acts before the block; the
    count is fixed. It cannot be the identity and works only after training.

    Args:
        budget: M, counted from the patches that enter the model, whatever enters the block; an image with no more than
            that is left as it is [D]. ``Ratio`` rounds down.
        maps: ``mlp``: version 1.1, a softmax over the patches of an MLP of each (64 hidden features). ``conv``: version
            1.0, a sigmoid of 3 x 3 convolutions on the grid (four, without bias [R]), then the mean over the grid; it
            needs every patch of the image in its place, so it acts once, before any other reducer.
    """

    summary = "a small network weighs the patches, M times over"
    source = "Ryoo et al., NeurIPS 2021 (arXiv 2106.11297)"
    trained_as = "by the task loss, with the network from its beginning"

    def __init__(self, budget: Budget, *, maps: Maps = "mlp") -> None:
        super().__init__(budget)
        self.maps = checked_choice(maps, Maps, "TokenLearner(maps=…)")

    def pooler(self, width: int, count: int) -> Pooler:
        return ByMLP(width, count) if self.maps == "mlp" else ByConvolution(width, count)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """A pooling at each block that reduces any tokens."""
        if self.maps == "conv" and len(blocks) > 1:
            raise ReducerError(
                f"token_learner with maps='conv' needs the grid of patches, and after block {min(blocks)} there is none"
                ": place it once, or use maps='mlp'"
            )
        super().attach(host, blocks)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        rows, columns = state.grid
        if self.maps == "conv" and any(patches != rows * columns for patches, _ in signals.layout.kinds):
            raise ReducerError(
                f"token_learner with maps='conv' needs all {rows} x {columns} patches in their places, and at block "
                f"{state.block} some are gone; place it before other reducers, or use maps='mlp'"
            )
        return super().decide(signals, state)
