"""From packed tokens to logits: a pool that knows lengths, then the model's own head."""

from __future__ import annotations

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from reducers.tokens import Layout, TokenBatch


def classify(base: VisionTransformer, batch: TokenBatch, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Logits (B, classes) from the normed features x (T, D)."""
    if isinstance(base, VisionTransformerDistilled):
        return _classify_distilled(base, batch, x)
    logits: Tensor = base.head(base.head_drop(base.fc_norm(_pool(base, batch, x))))
    return logits


def head_macs(base: VisionTransformer, layout: Layout) -> Tensor:
    """Multiply-adds of pool and head for each image, (B,) float64."""
    heads = [base.head, base.head_dist] if isinstance(base, VisionTransformerDistilled) else [base.head]
    linear = sum(head.weight.numel() for head in heads if isinstance(head, torch.nn.Linear))
    macs = torch.full((layout.images,), float(linear), dtype=torch.float64, device=layout.lengths.device)
    if base.global_pool != "map" or isinstance(base, VisionTransformerDistilled):
        return macs
    pool = base.attn_pool
    keys = (layout.lengths if base.pool_include_prefix else layout.patches).double()
    width = pool.num_heads * pool.head_dim
    rows = sum(p.numel() for n, p in pool.named_parameters() if p.dim() == 2 and not n.startswith("kv"))
    return macs + keys * pool.kv.weight.numel() + pool.latent_len * (rows + 2 * keys * width)


def _classify_distilled(
    base: VisionTransformerDistilled, batch: TokenBatch, x: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Class and distillation token each have a head; their logits are averaged, as timm does outside distilled
    training.
    """
    first = class_feature(base, batch, x)
    second = x[batch.layout.starts + (batch.cls >= 0)]  # next to the class token, or first where that was dropped
    by_class, by_distillation = base.head(base.head_drop(first)), base.head_dist(base.head_drop(second))
    if base.distilled_training and base.training:
        return by_class, by_distillation
    return (by_class + by_distillation) / 2


def class_feature(base: VisionTransformer, batch: TokenBatch, x: Tensor) -> Tensor:
    """(B, D) the class token; where an experiment let it be dropped, the mean of the survivors."""
    layout = batch.layout
    rows = x[batch.cls.clamp(min=0)]
    if layout.uniform is not None and layout.uniform[1] == base.num_prefix_tokens:
        return rows  # no image has lost a prefix token
    summed = torch.zeros(layout.images, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, layout.row_image, x)
    mean = summed / layout.lengths.clamp(min=1)[:, None].to(x.dtype)
    return torch.where((batch.cls >= 0)[:, None], rows, mean)


def _pool(base: VisionTransformer, batch: TokenBatch, x: Tensor) -> Tensor:
    layout, kind = batch.layout, base.global_pool
    if kind == "token":
        return class_feature(base, batch, x)
    first = torch.zeros_like(layout.prefix) if base.pool_include_prefix else layout.prefix
    valid = layout.valid_from(first)
    tokens = layout.pad(x, first)
    if tokens.shape[1] == 0:  # no image has a token left to pool
        return x.new_zeros(layout.images, x.shape[1])
    weight = batch.size
    if batch.alive is not None:  # what a training mask dropped is not pooled; where it dropped all, hard pools read all
        weight = weight * batch.alive
        alive = valid & (layout.pad(batch.alive, first) > 0.5)
        valid = torch.where(alive.any(1, keepdim=True), alive, valid) if kind != "avg" else valid
    if kind == "map":
        return _attention_pool(base, batch, tokens, valid, first)
    # a merged token stands for several patches, so the mean over patches weighs it by its size
    size = layout.pad(weight, first).to(x.dtype).masked_fill(~valid, 0)[..., None]
    mean = (tokens * size).sum(1) / size.sum(1).clamp(min=torch.finfo(x.dtype).tiny)
    if kind == "avg":
        return mean
    largest = tokens.masked_fill(~valid[..., None], -torch.inf).amax(1).masked_fill(~valid.any(1)[:, None], 0)
    return largest if kind == "max" else 0.5 * (largest + mean)


def _attention_pool(base: VisionTransformer, batch: TokenBatch, tokens: Tensor, valid: Tensor, first: Tensor) -> Tensor:
    """timm's latent attention pool, with padded keys masked and the key bias (log size) honoured."""
    layout, pool = batch.layout, base.attn_pool
    mask = None
    if layout.uniform is None or batch.key_bias is not None or batch.alive is not None:
        mask = torch.zeros(valid.shape, dtype=tokens.dtype, device=tokens.device)
        if batch.key_bias is not None:
            mask = layout.pad(batch.key_bias, first).to(tokens.dtype)
        mask = mask.masked_fill(~valid, -torch.inf)[:, None, None].expand(-1, -1, pool.latent_len, -1)
    pooled: Tensor = pool(tokens, attn_mask=mask)
    return pooled
