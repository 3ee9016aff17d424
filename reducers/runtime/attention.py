"""The one restatement of timm's attention, on packed tokens; it honours every optional part timm's has.

Keys and values come first, for all tokens; queries, attention rows and the projection only for the rows asked for.
Selecting rows before ``A @ V`` equals gathering them after the projection, so a pure selection never computes what
it will throw away.
"""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from torch import Tensor
from torch.nn import functional as F

from reducers.lazy import cached_property
from reducers.runtime.kernels import packed_attention
from reducers.tokens import Layout


class PackedAttention:
    """One block's attention over one batch: its parts computed when asked for, each at most once."""

    def __init__(
        self, attn: Attention, x: Tensor, layout: Layout, key_bias: Tensor | None, alive: Tensor | None = None
    ) -> None:
        self.attn = attn
        self.x = x  # (T, D), normed
        self.layout = layout
        self.key_bias = key_bias
        self.alive = alive  # (T,) under a training mask
        self._given: Tensor | None = None  # a map to attend with, in place of the softmax
        self._fused_qkv: Tensor | None = None
        self._all_queries: Tensor | None = None
        # parts are shared: one that a reducer first asks for under no_grad must not lose its gradient for the rest
        self._differentiable = torch.is_grad_enabled()

    @property
    def scale(self) -> float:
        """What logits are multiplied by; timm's fused kernel goes by the head's width whatever ``attn.scale`` says."""
        attn = self.attn
        return float(attn.head_dim**-0.5 if attn.fused_attn else attn.scale)

    def _gradients(self) -> torch.set_grad_enabled:
        """As they were when the block began."""
        return torch.set_grad_enabled(self._differentiable)

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first`` … ``last`` (of query, key, value) of the fused projection, (T, last - first, H, d)."""
        qkv, width, parts = self.attn.qkv, self.attn.attn_dim, last - first
        bias = None if qkv.bias is None else qkv.bias.narrow(0, first * width, parts * width)
        out = F.linear(x, qkv.weight.narrow(0, first * width, parts * width), bias)
        return out.view(x.shape[0], parts, self.attn.num_heads, self.attn.head_dim)

    def use_all_queries(self) -> None:
        """Say that every row will be asked for, so that queries, keys and values take one projection."""
        if "_keys_values" not in self.__dict__:
            with self._gradients():
                self._fused_qkv = self._project(self.x, 0, 3)

    @cached_property
    def _keys_values(self) -> tuple[Tensor, Tensor]:
        with self._gradients():
            both = self._project(self.x, 1, 3) if self._fused_qkv is None else self._fused_qkv[:, 1:]
            return self.attn.k_norm(both[:, 0]), both[:, 1]

    @property
    def keys(self) -> Tensor:
        return self._keys_values[0]

    @property
    def values(self) -> Tensor:
        return self._keys_values[1]

    def queries(self, rows: Tensor | None = None) -> Tensor:
        """(Tq, H, d) of the given packed rows, or of all."""
        with self._gradients():
            if rows is None or self._fused_qkv is not None or self._all_queries is not None:
                if self._all_queries is None:
                    q = self._project(self.x, 0, 1) if self._fused_qkv is None else self._fused_qkv
                    self._all_queries = self.attn.q_norm(q[:, 0])
                return self._all_queries if rows is None else self._all_queries.index_select(0, rows)
            return self.attn.q_norm(self._project(self.x.index_select(0, rows), 0, 1)[:, 0])

    @property
    def computed_all_queries(self) -> bool:
        return self._fused_qkv is not None or self._all_queries is not None

    def row(self, rows: Tensor) -> Tensor:
        """Attention of one query an image over all its keys: rows (B,) packed -> (T, H), after the softmax, at
        least float32.
        """
        if self._given is not None:
            images = torch.arange(self.layout.images, device=rows.device)
            given = self._given[images, :, (rows - self.layout.starts).clamp(min=0)]  # (B, H, L)
            return self.layout.unpad(given.transpose(1, 2))
        layout, wide = self.layout, torch.promote_types(self.x.dtype, torch.float32)
        q, keys = self.queries(rows).to(wide), self.keys.to(wide)  # q: (B, H, d)
        if layout.uniform is not None:
            by_image = keys.view(layout.images, layout.uniform[0], *keys.shape[1:])
            padded = (by_image * q[:, None]).sum(-1) * self.scale
            if self.key_bias is not None:
                padded = padded + self.key_bias.view(layout.images, layout.uniform[0], 1)
        else:
            logits = (keys * q[layout.row_image]).sum(-1) * self.scale
            if self.key_bias is not None:
                logits = logits + self.key_bias[:, None]
            padded = layout.pad(logits, fill=-torch.inf)
        if self.alive is None:
            return layout.unpad(padded.softmax(dim=1))
        seen = layout.pad(self.alive.to(wide))[..., None]
        return layout.unpad(masked_softmax(padded, seen, layout.valid[..., None], 1))

    def attend_with(self, attention: Tensor) -> None:
        """Sum the values by this map (B, H, L, L), whose padded places are 0, instead of the softmax."""
        self._given = attention

    def map(self) -> Tensor:
        """The whole attention map (B, H, L, L), after the softmax, at least float32; padded places are 0."""
        if self._given is not None:
            return self._given
        layout, wide = self.layout, torch.promote_types(self.x.dtype, torch.float32)
        q, k = self.queries().to(wide), self.keys.to(wide)
        with torch.autocast(self.x.device.type, enabled=False):  # else the product would be in half precision
            logits = layout.pad(q).transpose(1, 2) @ layout.pad(k).permute(0, 2, 3, 1) * self.scale
        if self.key_bias is not None:
            logits = logits + layout.pad(self.key_bias)[:, None, None]
        valid = layout.valid
        if self.alive is not None:
            seen = layout.pad(self.alive.to(wide))[:, None, None]  # (B, 1, 1, L)
            seen = seen + (1 - seen) * torch.eye(seen.shape[-1], dtype=wide, device=seen.device)
            return masked_softmax(logits, seen, valid[:, None, None], -1) * valid[:, None, :, None]
        if layout.uniform is not None:
            return logits.softmax(dim=-1)
        logits = logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1) * (valid[:, None, :, None] & valid[:, None, None])

    def rows_out(self, rows: Tensor | None, queries: Layout, of: PackedAttention | None = None) -> Tensor:
        """What the attention branch adds for the given packed rows (or all), before LayerScale and DropPath: (Tq, D).

        ``of``: whose keys and values are asked, where those are another sequence's.
        """
        attn, asked = self.attn, self if of is None else of
        drops = attn.training if attn.fused_attn else attn.attn_drop.training
        dropout = attn.attn_drop.p if drops else 0.0
        if self.alive is not None or self._given is not None:
            out = self._by_map(rows, dropout)
        else:
            out = packed_attention(
                self.queries(rows), asked.keys, asked.values, queries, asked.layout,
                scale=self.scale, key_bias=asked.key_bias, dropout=dropout,
            ).flatten(1)  # fmt: skip
        out = attn.norm(out)
        if attn.gate is not None:
            out = out * attn.gate(self.x if rows is None else self.x.index_select(0, rows)).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def _by_map(self, rows: Tensor | None, dropout: float) -> Tensor:
        """``A @ V`` by the whole map, under a training mask or with a given map: (Tq, H d)."""
        layout, v = self.layout, self.values
        weights = F.dropout(self.map().to(v.dtype), dropout)
        out = layout.unpad((weights @ layout.pad(v).transpose(1, 2)).transpose(1, 2)).flatten(1)
        return out if rows is None else out.index_select(0, rows)


_EPS = 1e-6


def masked_softmax(logits: Tensor, weight: Tensor, valid: Tensor, dim: int) -> Tensor:
    """DynamicViT's softmax: each key's share is multiplied by its ``weight`` in [0, 1], and gradients reach the weight.

    (exp(l - max) w + eps / N) / (sum + eps), over the ``valid`` of the N places; logits, weight and valid broadcast.
    """
    logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    shares = (logits - logits.amax(dim, keepdim=True)).exp() * weight * valid
    places = valid.sum(dim, keepdim=True).clamp(min=1)
    return (shares + _EPS / places * valid) / (shares.sum(dim, keepdim=True) + _EPS)
