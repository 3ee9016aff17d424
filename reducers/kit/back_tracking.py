"""Attention traced back from the output: which tokens each block must read (Lee et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from reducers.kit.selection import first_of


def back_track(maps: list[Tensor], *, prefix: int, count: int, mixing: float = 0.1) -> list[Tensor]:
    """Masks m_0 … m_L: m_i are the tokens block i must read, m_{i+1} those it must update; each holds the next one.

    maps: head-mean attention of each block, (B, T, T), rows are queries; of the last, those of the prefix will do.
    From m_L, the prefix tokens, backwards: score s = the column mean of the rows in m_{i+1}, each row weighed by
    (mixing w + 1 - mixing) with w its own score, which sum to 1 over m_{i+1} (all 1 at the start); m_i adds the
    ``count`` patches of highest score to m_{i+1}.
    """
    mask = torch.zeros_like(maps[0][:, 0], dtype=torch.bool)
    mask[:, :prefix] = True
    impact = mask.to(maps[0].dtype)
    masks = [mask]
    for attention in reversed(maps):
        weight = (mixing * impact + 1 - mixing) * mask
        score = (weight[:, None, : attention.shape[1]] @ attention).squeeze(1) / mask.sum(1, keepdim=True).clamp(min=1)
        order = score[:, prefix:].sort(dim=1, descending=True, stable=True).indices
        chosen = first_of(order, torch.full_like(order[:, 0], count))
        mask = mask | torch.cat([torch.zeros_like(mask[:, :prefix]), chosen], dim=1)
        impact = score * mask
        impact = impact / impact.sum(1, keepdim=True).clamp(min=torch.finfo(impact.dtype).tiny)
        masks.append(mask)
    return masks[::-1]
