"""Attention under a training mask, in which a token that is dropped still learns."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6


def masked_softmax(logits: Tensor, weight: Tensor, valid: Tensor, dim: int) -> Tensor:
    """DynamicViT's softmax: each key's share is multiplied by its ``weight`` in [0, 1], and gradients reach the weight.

    (exp(l - max) w + eps / N) / (sum + eps), over the ``valid`` of the N places; logits, weight and valid broadcast.
    """
    logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    shares = (logits - logits.amax(dim, keepdim=True)).exp() * weight * valid
    places = valid.sum(dim, keepdim=True).clamp(min=1)
    return (shares + _EPS / places * valid) / (shares.sum(dim, keepdim=True) + _EPS)
