"""The contrast: the same decisions carried out the usual way, with padding and masks.

Published code for adaptive reducers keeps a rectangular tensor: what an image drops is zeroed and hidden from the
attention by a key mask, in place ("masked") or after the batch is cut to its longest image ("padded"). The linear
layers then multiply the padding too. Everything else is as kind to it as to the packed run (fused attention, one
class query for the score, attention rows only for the tokens that stay), so that what is left between the two is
padding and masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers import Placement
from reducers.errors import ReducerError
from reducers.hosts import host_of
from reducers.maps import Keep
from reducers.reducer import State
from reducers.signals import Signals
from reducers.tokens import Layout

_OFFERS = (
    "the padded run carries out selections only, by class attention, keys and values; another reducer's contrast needs "
    "a run of its own"
)


class PaddedSignals(Signals):
    """What a reducer sees of a padded batch: every image has all places; those that hold no token score nothing."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, live: Tensor | None, prefix: int, scale: float) -> None:
        images, _, places, _ = k.shape
        layout = Layout.alike(images, places, prefix, k.device)
        size = torch.ones(layout.rows, dtype=torch.float32, device=k.device)
        super().__init__(layout, size, layout.starts, None)
        self.live = live  # (B, L) bool, None where every place holds a token
        self._q, self._k, self._v, self._scale = q, k, v, scale  # (B, H, L, d)

    def class_attention(self) -> Tensor:
        logits = (self._q[:, :, :1].float() @ self._k.float().transpose(2, 3)).squeeze(2) * self._scale  # (B, H, L)
        if self.live is not None:
            logits = logits.masked_fill(~self.live[:, None], -torch.inf)
        return logits.softmax(dim=2).transpose(1, 2).flatten(0, 1)

    def keys(self) -> Tensor:
        return self._k.transpose(1, 2).flatten(0, 1)

    def values(self) -> Tensor:
        values = self._v.transpose(1, 2)
        if self.live is not None:
            values = values * self.live[:, :, None, None]
        return values.flatten(0, 1)

    def attention(self) -> Tensor:
        raise ReducerError(_OFFERS)

    def output(self) -> Tensor:
        raise ReducerError(_OFFERS)

    def previous_attention(self) -> Tensor:
        raise ReducerError(_OFFERS)

    def positions(self) -> Tensor:
        raise ReducerError(_OFFERS)


class PaddedViT(nn.Module):
    """A timm ViT with reducers that select, run on rectangular tensors.

    ``compact=True``: after each selection the batch is cut to its longest image; False: it keeps all places to the
    end. A reducer's budget must not depend on the number of tokens entering the block (``Count``, or a share of the
    initial tokens), which no padded run knows.
    """

    def __init__(self, base: Any, placement: Placement, *, compact: bool) -> None:
        super().__init__()
        host_of(base)
        gated = any(block.attn.gate is not None for block in base.blocks)
        if base.global_pool != "token" or gated or hasattr(base, "head_dist"):
            raise ReducerError("the padded run is for models with a class token, one head and no attention gate")
        self.base: Any = base
        self.placement = placement.resolve(len(base.blocks))
        self.compact = compact

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        base = self.base
        x = base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))
        initial = x.shape[1] - base.num_prefix_tokens
        live: Tensor | None = None
        for index, block in enumerate(base.blocks):
            x, live = self._block(block, x, live, State(index, len(base.blocks), initial))
        logits: Tensor = base.head(base.head_drop(base.fc_norm(base.norm(x)[:, 0])))
        return logits

    def _block(self, block: Any, x: Tensor, live: Tensor | None, state: State) -> tuple[Tensor, Tensor | None]:
        attn = block.attn
        normed = block.norm1(x)
        qkv = attn.qkv(normed).view(*x.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        mask = None if live is None else live[:, None, None]
        reducer = self.placement.blocks.get(state.block)
        if reducer is not None:
            decision = reducer.decide(PaddedSignals(q, k, v, live, self.base.num_prefix_tokens, attn.scale), state)
            if decision is not None:
                if not isinstance(decision.map, Keep):
                    raise ReducerError(f"the padded run carries out selections only; {reducer.name} merges tokens")
                x, q, live = self._select(decision.map, x, q)
        if mask is not None:
            mask = mask.expand(-1, -1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale).transpose(1, 2).flatten(2)
        x = x + block.ls1(attn.proj(attn.norm(out)))
        if live is not None:
            x = x * live[..., None]  # zeroed, as published; the mask alone would do
        return x + block.ls2(block.mlp(block.norm2(x))), live

    def _select(self, kept: Keep, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, queries and which of their places hold a token, after a selection."""
        if not self.compact:
            live = torch.zeros(kept.old.rows, dtype=torch.bool, device=x.device)
            live[kept.rows] = True
            return x, q, live.view(x.shape[:2])
        rows = kept.new.pad(kept.rows)  # (B, longest)
        chosen = q.transpose(1, 2).flatten(0, 1)[rows].transpose(1, 2)
        return x.flatten(0, 1)[rows], chosen, kept.new.valid
