"""What is added to every key's logits, folded into the products themselves, so that no mask is needed.

A fused kernel that knows masks is another, slower one than flash attention, which knows none; and a mask is in the type
of the queries, so in half precision the logarithms of sizes are rounded to eight bits. With b what is added and s the
scale, ``q' = [q, 1, 1, 0 …]``, ``k' = [k, hi, lo, 0 …]`` and ``v' = [v, 0 …]`` give the logits ``s q·k + b``, where
``hi + lo`` is b / s in two parts of the keys' type. What comes out lies in the first columns. The width grows to the
next multiple of eight, as flash attention has it: 64 to 72.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Attention = Literal["mask", "fold"]
"""How the sizes of tokens come into attention, where it is computed in half precision on a GPU: as a mask, or folded
into the products. Everywhere else they are a mask."""

ATTENTIONS: tuple[Attention, ...] = get_args(Attention)


_FAR = 2.0**15
"""Where a bias in units of the scale ends: float16 holds it, and a token without any size, whose bias is -inf, still
gets no attention beside others, where infinity less infinity would make it all NaN."""


def folded_width(width: int) -> int:
    """The width of a head with two more columns, made a multiple of eight: 64 -> 72."""
    return -(-(width + 2) // 8) * 8


def folded_keys(k: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    """Keys (..., K, H, d) with what is added to their logits, ``key_bias`` (..., K), in two more columns:
    (..., K, H, d').
    """
    wide = torch.promote_types(key_bias.dtype, torch.float32)
    exact = (key_bias.to(wide) / scale).clamp(-_FAR, _FAR)
    high = exact.to(k.dtype)
    low = (exact - high.to(wide)).to(k.dtype)  # through both, the gradient of the bias is 1 + (1 - 1)
    parts = torch.stack((high, low), dim=-1).unsqueeze(-2).expand(*k.shape[:-1], 2)
    return torch.cat((k, parts, _zeros(k)), dim=-1)


def folded_queries(q: Tensor) -> Tensor:
    """Queries (..., Q, H, d) that take each key's two columns as they are: (..., Q, H, d')."""
    return torch.cat((q, q.new_ones(()).expand(*q.shape[:-1], 2), _zeros(q)), dim=-1)


def folded_values(v: Tensor) -> Tensor:
    """Values (..., K, H, d) as wide as their keys: (..., K, H, d')."""
    return torch.cat((v, v.new_zeros(()).expand(*v.shape[:-1], folded_width(v.shape[-1]) - v.shape[-1])), dim=-1)


def _zeros(x: Tensor) -> Tensor:
    """The columns behind those two."""
    left = folded_width(x.shape[-1]) - x.shape[-1] - 2
    return x.new_zeros(()).expand(*x.shape[:-1], left)
