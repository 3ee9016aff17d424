"""STTABT's concrete masks: from guessed attention to soft sets of tokens, and a block's computation under them
(Lee et al., ICLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reducers.hosts.protocol import Core, HostBlock
from reducers.runtime.attention import PackedAttention
from reducers.tokens import TokenBatch

MIXING = 0.1  # how much a row's own importance weighs its attention
TEMPERATURE = 0.1
_SURE = math.log((1 - 1e-7) / 1e-7)  # no logit is further from 0 than this


def evened(scores: Tensor) -> Tensor:
    """Scores made about uniform in (0, 1): standardised over the keys, then the normal distribution's CDF, then the
    mean over heads. (B, H, Q, T) -> (B, Q, T)
    """
    if not len(scores):  # of no image there is no variance
        return scores.mean(dim=1)
    spread, mean = torch.var_mean(scores, dim=-1, correction=0, keepdim=True)
    return torch.special.ndtr((scores - mean) / (spread + 1e-12).sqrt()).mean(1)


def traced(even: Tensor, mask: Tensor, importance: Tensor) -> Tensor:
    """One step back: the importance of tokens to a block's input, in [0.01, 1]; the largest is 1.

    even (B, Q, T): the attention of the first Q tokens (those that may count); mask, importance (B, T): of the tokens
    the block must update. -> (B, T)
    """
    weight = mask * (MIXING * importance + 1 - MIXING)
    summed = (weight[:, None, : even.shape[1]] @ even).squeeze(1) / mask.sum(1, keepdim=True)
    return 0.01 + 0.99 * summed / summed.amax(1, keepdim=True).clamp(min=torch.finfo(summed.dtype).tiny)


def concrete_masks(scores: list[Tensor], thresholds: Tensor, *, prefix: int) -> list[Tensor]:
    """Soft masks M_i … M_L (B, T) from the attention logits (B, H, Q, T) of blocks i … L - 1, each at least the next.

    ``thresholds``: p_logit of each block. M_L is 1 for prefix tokens alone, whose importance is 1. The importance
    stands where a concrete distribution has its uniform noise: mask = sigmoid((p_logit + logit(importance)) / 0.1), so
    that mask >= 0.5 where importance >= 1 - sigmoid(p_logit).
    """
    importance = torch.ones_like(scores[-1][:, 0, 0])
    mask = torch.zeros_like(importance)
    mask[:, :prefix] = 1
    masks = [mask]
    for found, threshold in zip(reversed(scores), reversed(thresholds.unbind()), strict=True):
        importance = traced(evened(found), mask, importance)
        logit = importance.logit(1e-7) + threshold.to(importance.dtype).clamp(-_SURE, _SURE)
        mask = torch.maximum((logit / TEMPERATURE).sigmoid(), mask)
        masks.append(mask)
    return masks[::-1]


class WeighedAttention(PackedAttention):
    """Attention under concrete masks: keys and values, and the attention to them, times ``read`` (T,), the attention
    made to sum to one again; queries times ``write`` (T,).
    """

    def __init__(self, core: Core, key_bias: Tensor | None, read: Tensor, write: Tensor) -> None:
        bias = read.clamp(min=torch.finfo(torch.float32).tiny).log()
        super().__init__(core, bias if key_bias is None else key_bias + bias)
        self.read, self.write = read[:, None, None], write[:, None, None]

    @property
    def keys(self) -> Tensor:
        keys = super().keys
        return keys * self.read.to(keys.dtype)

    @property
    def values(self) -> Tensor:
        values = super().values
        return values * self.read.to(values.dtype)

    def queries(self, rows: Tensor | None = None) -> Tensor:
        queries, write = super().queries(rows), self.write
        return queries * (write if rows is None else write.index_select(0, rows)).to(queries.dtype)


@contextmanager
def outputs_times(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """While it lasts, what every linear layer in the module gives is multiplied by ``weight``."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(lambda _layer, _input, output: output * weight) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_block(block: HostBlock, batch: TokenBatch, read: Tensor, write: Tensor) -> Tensor:
    """A block's computation under concrete masks (T,), ``read`` of its input and ``write`` of its output: (T, D).

    The outputs of the attention's projection and of both linear layers of the MLP are multiplied by ``write``. A token
    that is not updated so keeps its value; the masks of later blocks see to it that nobody reads it.
    """
    layout, weight = batch.layout, write[:, None].to(batch.x.dtype)
    attention = WeighedAttention(block.core(batch), batch.key_bias, read, write)
    attention.use_all_queries()
    x = block.after_attention(batch.x, attention.rows_out(None, layout) * weight, layout)
    with outputs_times(block.mlp, weight):
        return block.after_mlp(x, layout)
