"""STTABT's ApproxNet: a narrow twin of the model that guesses its attention (Lee et al., ICLR 2023).

Same depth, heads and tokens; a fraction of the width. It runs before the model does, on the images themselves, and what
it is asked for are its attention scores. It learns by distillation from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.errors import ReducerError
from reducers.runtime.plain import Listener, run_unreduced

_EPS = 1e-6  # of the norms, as in timm's


@dataclass(frozen=True)
class Guess:
    """What ApproxNet says of a batch of images; T tokens with the prefix."""

    scores: list[Tensor]  # (B, H, T, T) for each block: attention logits, rows are queries, at least float32
    embedding: Tensor | None = None  # (B, T, w) entering block 0; this and what follows only for distillation
    hidden: Sequence[Tensor] = ()  # (B, T, w) leaving each block
    logits: Tensor | None = None  # (B, classes)


@dataclass(frozen=True)
class Dense:
    """The same of the model itself, unreduced."""

    maps: list[Tensor]  # (B, H, T, T) for each block: attention after the softmax
    embedding: Tensor  # (B, T, D)
    hidden: list[Tensor]  # (B, T, D) for each block
    logits: Tensor  # (B, classes)


class ApproxBlock(nn.Module):
    """A pre-norm block, which tells its attention logits."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, w) -> the logits (B, H, T, T) and the new x."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self._scores(query, key)
        seen = scores.softmax(-1).to(value.dtype) @ value
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return scores, x + self.mlp(self.norm2(x))

    def first_rows(self, x: Tensor, rows: int) -> Tensor:
        """The logits of the first ``rows`` queries alone, (B, H, rows, T)."""
        x, width = self.norm1(x), x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(x[:, :rows], weight[:width], bias[:width]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key = F.linear(x, weight[width : 2 * width], bias[width : 2 * width]).unflatten(2, (self.heads, -1))
        return self._scores(query, key.transpose(1, 2))

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class ApproxNet(nn.Module):
    """A vision transformer of the host's depth, heads and tokens, ``shrink`` times narrower (each head, at least 1)."""

    def __init__(self, host: Any, *, shrink: int) -> None:
        super().__init__()
        self.grid: tuple[int, int] = host.grid
        self.prefix: int = host.prefix
        self.width = host.heads * max(1, host.width // (shrink * host.heads))
        size = host.image_size
        patch = (size[0] // self.grid[0], size[1] // self.grid[1])
        self.patch_embed = nn.Conv2d(host.channels, self.width, patch, stride=patch)
        self.prefix_tokens = nn.Parameter(0.02 * torch.randn(1, self.prefix, self.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.prefix + host.patches, self.width))
        self.blocks = nn.ModuleList(ApproxBlock(self.width, host.heads) for _ in range(host.embedded, host.depth))
        self.norm = nn.LayerNorm(self.width, eps=_EPS)
        self.head = nn.Linear(self.width, host.classes or host.width)  # without a head, what is pooled

    def forward(self, images: Tensor, *, whole: bool = True) -> Guess:
        """What the network says of images (B, C, H, W).

        Not the ``whole`` of it: attention scores alone, and of the last block only those of the prefix queries,
        (B, H, P, T): no other is asked for when importance is traced back.
        """
        x = self.patch_embed(images)
        self.check_grid((x.shape[2], x.shape[3]))
        x = torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = embedding = x + self.positions
        scores: list[Tensor] = []
        hidden: list[Tensor] = []
        for block in self.blocks if whole else self.blocks[:-1]:
            found, x = block(x)
            scores.append(found)
            hidden.append(x)
        if not whole:
            last = self.blocks[-1]
            assert isinstance(last, ApproxBlock)
            return Guess([*scores, last.first_rows(x, self.prefix)])
        return Guess(scores, embedding, hidden, self.head(self.norm(x)[:, 0]))

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse images of other rows and columns of patches than the model's own."""
        if grid != self.grid:
            raise ReducerError(
                f"ApproxNet was made for {self.grid[0]} x {self.grid[1]} patches and the images have "
                f"{grid[0]} x {grid[1]}: use images of the size the model was made for, and no method that resizes them"
            )

    def macs(self) -> int:
        """Multiply-adds for one image of a pass that is not the whole."""
        width, patches = self.width, self.grid[0] * self.grid[1]
        tokens, blocks = self.prefix + patches, len(self.blocks)
        block = tokens * 12 * width**2 + 2 * tokens**2 * width
        last = (self.prefix + tokens) * width**2 + self.prefix * tokens * width
        return patches * self.patch_embed.weight.numel() + (blocks - 1) * block + last


@torch.no_grad()
def watch(host: Any, images: Tensor) -> Dense:
    """Run the model unreduced and tell what ApproxNet is to guess."""
    watcher, batch = Listener(lambda signals: signals.attention()), host.embed(images)
    entering = batch.layout.pad(batch.x)
    hidden: list[Tensor] = []
    for after in run_unreduced(host, batch, watcher):
        batch = after
        hidden.append(batch.x.view(entering.shape))
    logits = host.classify(batch)
    assert isinstance(logits, Tensor)
    return Dense(watcher.heard, entering, hidden, logits)


class Mimicry(nn.Module):
    """The linear maps from ApproxNet's features to the model's, which only its distillation uses."""

    def __init__(self, narrow: int, wide: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(narrow, wide)
        self.hidden = nn.ModuleList(nn.Linear(narrow, wide) for _ in range(depth))

    def forward(self, guess: Guess, dense: Dense, *, hidden: float, prediction: float) -> dict[str, Tensor]:
        """The four parts of the distillation loss, weighted: KL of attention rows (model || guess), mean over layers,
        heads, queries and images; ``hidden`` times the mean squared error of features after each block; that of
        the embedding; ``prediction`` times that of the class probabilities.
        """
        assert guess.embedding is not None and guess.logits is not None
        attention = [
            F.kl_div(scores.log_softmax(-1), seen, reduction="none").sum(-1).mean()
            for scores, seen in zip(guess.scores, dense.maps, strict=True)
        ]
        features = [
            F.mse_loss(mimic(ours).float(), theirs.float())
            for mimic, ours, theirs in zip(self.hidden, guess.hidden, dense.hidden, strict=True)
        ]
        ours, theirs = guess.logits.float().softmax(1), dense.logits.float().softmax(1)
        return {
            "attention": torch.stack(attention).mean(),
            "hidden": hidden * torch.stack(features).mean(),
            "embedding": F.mse_loss(self.embedding(guess.embedding).float(), dense.embedding.float()),
            "prediction": prediction * F.mse_loss(ours, theirs),
        }
