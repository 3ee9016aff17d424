"""What the learned poolings share: an image's patches become M tokens, each a mix of them all by learned weights.

PatchMerger, Sinkhorn, SiT and TokenLearner differ in how the weights come about (a ``Pooler``); where they act, how
many tokens they leave, and what becomes of the images that have no more than that is one rule for all, said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.decision import Decision
from reducers.kit.selection import at_most
from reducers.maps import Mix
from reducers.reducer import State, TokenReducer, Traits
from reducers.signals import Signals
from reducers.tokens import Layout


class Pooler(nn.Module):
    """The parameters of one pooling, at one block, and the weights that they give."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count  # tokens that come out

    def forward(self, x: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The weights (B, M, N), at least float32 and 0 in the padding, and the new tokens (B, M, D).

        x (B, N, D), valid (B, N): an image's patches. grid: rows and columns of the original ones. ``None`` for the
        tokens: they are weights @ x.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs the patches")

    def macs(self, patches: Tensor) -> Tensor:
        """Multiply-adds for images of so many patches, (B,) float64; those of weights @ x included."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it costs")


def softmax_over_tokens(logits: Tensor, valid: Tensor) -> Tensor:
    """Each new token's weights over an image's patches, which sum to 1; padding gets 0. (B, M, N), at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(~valid[:, None], torch.finfo(logits.dtype).min).softmax(dim=2)


def pooled_counts(budget: Budget, host: Any, blocks: tuple[int, ...]) -> dict[int, int]:
    """Tokens that leave each block that reduces any, worked out from the patches that enter the model."""
    counts: dict[int, int] = {}
    patches: int = host.patches
    for block in sorted(blocks):
        entering, patches = patches, budget.count(patches, initial=host.patches, prefix=host.prefix, rounding="floor")
        if patches < entering:
            counts[block] = patches
    return counts


def pooled_map(layout: Layout, weights: Tensor) -> Mix:
    """The weights (B, M, N) as a map of all tokens: prefix tokens stay,
    and so do the patches of images that have no more than M.
    """
    count = weights.shape[1]
    old_place = torch.arange(layout.longest, device=weights.device)
    if layout.uniform is not None:
        prefix = layout.uniform[1]
        new = Layout.alike(layout.images, prefix + count, prefix, weights.device)
        new_place = torch.arange(prefix + count, device=weights.device)
        stays = (new_place[:, None] == old_place) & (old_place < prefix)
        return Mix(layout, new, F.pad(weights, (prefix, 0, prefix, 0)) + stays)
    new = layout.leaving(at_most(layout, count))
    new_place = torch.arange(new.longest, device=weights.device)
    prefixes = layout.prefix[:, None]
    row = (new_place - prefixes).clamp(0, count - 1)  # (B, places) each image's patches begin behind its own prefix
    column = (old_place - prefixes).clamp(0, weights.shape[2] - 1)
    mixed = weights.gather(1, row[:, :, None].expand(-1, -1, weights.shape[2]))
    mixed = mixed.gather(2, column[:, None].expand(-1, row.shape[1], -1))
    patch = (new_place >= prefixes)[:, :, None] & (old_place >= prefixes)[:, None]
    pools = patch & (layout.patches > count)[:, None, None]
    whole = torch.where(pools, mixed, (new_place[:, None] == old_place).to(weights.dtype))
    return Mix(layout, new, whole.masked_fill(~(new.valid[:, :, None] & layout.valid[:, None]), 0))


def pooled_features(pooled: Mix, x: Tensor, tokens: Tensor) -> Tensor:
    """The features behind ``pooled_map``, where the new tokens (B, M, D) are no plain mix of the old ones x (T, D)."""
    old, new, tokens = pooled.old, pooled.new, tokens.to(x.dtype)
    if old.uniform is not None:
        lead = x.view(old.images, old.uniform[0], x.shape[1])[:, : old.uniform[1]]
        return torch.cat([lead, tokens], dim=1).flatten(0, 1)
    stays = new.is_prefix | (old.patches <= tokens.shape[1])[new.row_image]
    place = (new.row_index - new.prefix[new.row_image]).clamp(min=0)
    unchanged = x[old.starts[new.row_image] + new.row_index]
    return torch.where(stays[:, None], unchanged, tokens[new.row_image, place])


class LearnedPooling(TokenReducer):
    """A method that pools the patches into M tokens with parameters of its own at each of its blocks.

    M is fixed when the reducer joins a model: ``budget`` counts from the patches that enter the model, block after
    block; what other reducers remove before is not known then, so give a ``Count`` beside them. ``Ratio`` rounds down.
    An image with no more than M patches is left as it is [D]; so M does not depend on the image.

    What is new learns ten times as fast as the pretrained model [D]: weights that start out nearly even make tokens
    that are nearly alike, and at the model's own rate they part too slowly.
    """

    traits = Traits(trained=True, site="input", pools=True)
    budgets = ("count", "ratio")  # a number dropped would be of the tokens that enter the model, at each block anew
    schedule: ClassVar[Mapping[str, Any]] = {"reducer_lr_scale": 10.0}

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = checked_budget(budget, type(self).__name__)
        self.poolers = nn.ModuleDict()  # by block

    def pooler(self, width: int, count: int) -> Pooler:
        """New parameters that pool tokens of so many features into ``count``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it pools")

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """A pooling at each block that reduces any."""
        counts = pooled_counts(self.budget, host, blocks)
        self.poolers = nn.ModuleDict({str(block): self.pooler(host.width, count) for block, count in counts.items()})

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        if str(state.block) not in self.poolers:  # as many enter as may leave
            return None
        pooler = cast(Pooler, self.poolers[str(state.block)])
        if layout.width_from(layout.prefix) <= pooler.count:  # the most patches that an image has
            return None
        x = signals.output()
        weights, tokens = pooler(layout.pad_patches(x), layout.valid_patches, state.grid)
        if signals.counting:
            signals.spend(at_most(layout, pooler.count).busy * pooler.macs(layout.patches.double()))
        pooled = pooled_map(layout, weights)
        return Decision(pooled, None if tokens is None else pooled_features(pooled, x, tokens))
