"""ToMe the straightforward way, on a plain loop over timm's blocks: what the project's own ToMe is timed against.

Written from the paper's description (Bolya et al., ICLR 2023, section 3): split the tokens alternately in two sets,
link each of the first to its most similar of the second, merge the r closest pairs by a mean weighted with their sizes
(scatter), and weigh attention by size. No packing, no shared index work, nothing but the algorithm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.errors import ReducerError
from reducers.hosts import host_of


class ReferenceToMe(nn.Module):
    """Merge ``r`` pairs in every block. ``fused=False`` writes the attention map out, as the authors' code does."""

    def __init__(self, base: Any, r: int, *, fused: bool = True) -> None:
        super().__init__()
        host_of(base)
        if base.num_prefix_tokens != 1 or base.global_pool != "token":
            raise ReducerError("the reference ToMe is for models with a class token and no other prefix token")
        self.base: Any = base
        self.r = r
        self.fused = fused

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        base = self.base
        x = base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))
        size: Tensor | None = None  # (B, N, 1) patches in each token, once some have merged
        for block in base.blocks:
            x, metric = self._attend(block, x, size)
            x, size = merge_most_similar(x, metric, size, self.r)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        logits: Tensor = base.head(base.head_drop(base.fc_norm(base.norm(x)[:, 0])))
        return logits

    def _attend(self, block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features after the attention residual (B, N, D), and the mean of the heads' keys (B, N, d)."""
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        bias = None if size is None else size.log()[:, None, None, :, 0].to(q.dtype)  # (B, 1, 1, N)
        if self.fused:
            mask = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
        else:
            logits = q * attn.scale @ k.transpose(2, 3)
            out = (logits if bias is None else logits + bias).softmax(dim=-1) @ v
        out = attn.norm(out.transpose(1, 2).flatten(2))
        return x + block.ls1(attn.proj(out)), k.mean(dim=1)


@torch.no_grad()
def closest_pairs(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the first set merge (B, r), into which of the second (B, r), and which of the first stay (B, rest)."""
    direction = metric / metric.norm(dim=-1, keepdim=True)
    similarity = direction[:, 0::2] @ direction[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf  # the class token merges with nobody
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merging, staying = order[:, :r], order[:, r:].sort(dim=-1).values
    return merging, partner.gather(1, merging), staying


def merge_most_similar(x: Tensor, metric: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None]:
    """The ``r`` closest pairs become one token each, a mean weighted by size. x: (B, N, D) -> (B, N - r, D)."""
    r = min(r, (x.shape[1] - 1) // 2)
    if r == 0:
        return x, size
    merging, into, staying = closest_pairs(metric, r)
    if size is None:
        size = torch.ones(*x.shape[:2], 1, dtype=torch.float32, device=x.device)

    def together(values: Tensor) -> Tensor:
        first, second = values[:, 0::2], values[:, 1::2]
        wide = values.shape[-1]
        moved = first.gather(1, merging[..., None].expand(-1, -1, wide))
        kept = first.gather(1, staying[..., None].expand(-1, -1, wide))
        return torch.cat([kept, second.scatter_add(1, into[..., None].expand(-1, -1, wide), moved)], dim=1)

    merged_size = together(size)
    return together(x * size.to(x.dtype)) / merged_size.to(x.dtype), merged_size
