"""What heads of several libraries read of the tokens that are left. A library-free part of hosts."""

from __future__ import annotations

import torch
from torch import Tensor

from reducers.tokens import TokenBatch


def class_or_mean(batch: TokenBatch, x: Tensor, prefix: int) -> Tensor:
    """(B, D) the class token of features x (T, D); where an experiment let it be dropped, the mean of the survivors."""
    layout = batch.layout
    rows = x[batch.cls.clamp(min=0)]
    if layout.uniform is not None and layout.uniform[1] == prefix:
        return rows  # no image has lost a prefix token
    summed = torch.zeros(layout.images, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, layout.row_image, x)
    mean = summed / layout.lengths.clamp(min=1)[:, None].to(x.dtype)
    return torch.where((batch.cls >= 0)[:, None], rows, mean)


def mean_of_patches(batch: TokenBatch, x: Tensor) -> Tensor:
    """(B, D) the mean over patches, in which a merged token weighs what it stands for; 0 without any patch."""
    layout = batch.layout
    weight = batch.size if batch.alive is None else batch.size * batch.alive
    tokens, size = layout.pad_patches(x), layout.pad_patches(weight)[..., None].to(x.dtype)
    return (tokens * size).sum(1) / size.sum(1).clamp(min=torch.finfo(x.dtype).tiny)
