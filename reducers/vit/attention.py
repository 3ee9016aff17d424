"""The one restatement of timm's attention, on packed tokens; it honours every optional part timm's has.

Keys and values come first, for all tokens; queries, attention rows and the projection only for the rows asked for.
Selecting rows before ``A @ V`` equals gathering them after the projection, so a pure selection never computes what
it will throw away.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor
from torch.nn import functional as F

from reducers.lazy import cached_property
from reducers.tokens import Layout

varlen_attn: Any
try:  # flash attention over packed rows; older torch has none, and pads and masks instead
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Layout,
    keys: Layout,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each image's queries over that image's keys, fused. q: (Tq, H, d), k and v: (Tk, H, d) -> (Tq,
    H, d).
    """
    if queries.uniform is not None and keys.uniform is not None:
        faster = _products_are_faster(q, keys.uniform[0], dropout)
        if faster and keys.images == 1:
            bias = None if key_bias is None else key_bias.to(q.dtype)
            return _one_by_products(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), bias, scale).transpose(
                0, 1
            )
        mask = None if key_bias is None else key_bias.view(keys.images, 1, 1, keys.uniform[0]).to(q.dtype)
        by_image = (
            q.view(queries.images, queries.uniform[0], *q.shape[1:]),
            k.view(keys.images, keys.uniform[0], *k.shape[1:]),
            v.view(keys.images, keys.uniform[0], *v.shape[1:]),
        )
        if faster:
            return _by_products(*by_image, mask, scale).view(q.shape)
        return _fused(*by_image, mask, scale, dropout).reshape(q.shape)
    if q.device.type == "cpu":
        return _image_by_image(q, k, v, queries, keys, scale, key_bias, dropout)
    if key_bias is None and dropout == 0 and _varlen_takes(q):
        return _varlen(q, k, v, queries, keys, scale)
    valid = keys.valid
    bias = (
        torch.zeros(valid.shape, dtype=q.dtype, device=q.device) if key_bias is None else keys.pad(key_bias.to(q.dtype))
    )
    # a finished image has no key at all: leaving its (padded, unread) rows open keeps the softmax free of NaN
    mask = bias.masked_fill(~valid & (keys.lengths > 0)[:, None], -torch.inf)[:, None, None]
    return queries.unpad(_fused(queries.pad(q), keys.pad(k), keys.pad(v), mask, scale, dropout))


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """(B, N, H, d) in and out; mask broadcasts to (B, H, Nq, Nk)."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if mask is not None:
        mask = mask.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)


def _products_are_faster(q: Tensor, keys: int, dropout: float) -> bool:
    """Whether two plain products beat the fused kernel on images of equal length."""
    if q.device.type != "cpu" or q.dtype != torch.float32 or dropout > 0 or torch.compiler.is_compiling():
        return False
    return keys in MEDIUM and not torch.is_grad_enabled()


MEDIUM = range(80, 192)
"""Keys for which the fused kernel on a CPU, whose blocks are made for longer rows, loses 5-20 % to two plain products
over a few images at a time (measured: DeiT-Ti and S, 50-197 tokens, two threads)."""
_AT_ONCE = 2**18  # attention logits: they stay in the cache between the two products


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As ``_fused``, without gradients: (B, N, H, d) in and out."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    step = max(_AT_ONCE // (q.shape[1] * q.shape[2] * k.shape[1]), 1)
    q = q * scale
    for first in range(0, q.shape[0], step):
        some = slice(first, first + step)
        logits = q[some].transpose(1, 2) @ k[some].permute(0, 2, 3, 1)
        if mask is not None:
            logits += mask[some]
        weights = torch.softmax(logits, -1, out=logits)
        out[some].transpose(1, 2).copy_(weights @ v[some].transpose(1, 2))
    return out


def _one_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One image, (H, N, d) in and out, without gradients."""
    logits = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        logits += mask
    return torch.bmm(torch.softmax(logits, -1, out=logits), v)


def _varlen_takes(q: Tensor) -> bool:
    """Whether flash attention over packed rows is there: half precision on an Ampere GPU or newer."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and half and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, scale: float) -> Tensor:
    """Flash attention on the packed rows themselves: no padding, and no wait for the device."""
    natural = q.shape[-1] ** -0.5  # the kernel's own; passing another needs no argument that some versions lack
    if scale != natural:
        q = q * (scale / natural)
    out: Tensor = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), queries.offsets, keys.offsets, queries.longest, keys.longest
    )
    return out


SMALL = 256
"""Keys up to which an image's attention on a CPU is two plain matrix products: up to 20 % faster than the fused kernel,
whose blocks are made for longer rows (measured: DeiT-Ti and S, 40-197 tokens, two threads). Grouping images by length
with padding and a key mask was slower than either."""


@torch.compiler.disable  # it would be written out once for every image, and again for every new set of lengths
def _image_by_image(
    q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, scale: float, bias: Tensor | None, dropout: float
) -> Tensor:
    """On a CPU a call for each image costs less than padding would: nothing is copied, nothing is multiplied in
    vain.
    """
    plain = dropout == 0 and not torch.is_grad_enabled() and q.dtype in (torch.float32, torch.float64)
    by_head = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # (H, T, d)
    counts = queries.counts, keys.counts, keys.counts
    parts = zip(*(x.split(n, dim=1) for x, n in zip(by_head, counts, strict=True)), strict=True)
    biases = [None] * keys.images if bias is None else bias.to(q.dtype).split(keys.counts)
    if not plain:
        out = [_fused_one(qi, ki, vi, mask, scale, dropout) for (qi, ki, vi), mask in zip(parts, biases, strict=True)]
        return torch.cat(out, dim=1).transpose(0, 1) if out else q
    whole = torch.empty_like(q)
    for (qi, ki, vi), mask, place in zip(parts, biases, whole.split(queries.counts), strict=True):
        if ki.shape[1] > SMALL:
            out_i = _fused_one(qi, ki, vi, mask, scale, dropout)
        else:
            out_i = _one_by_products(qi, ki, vi, mask, scale)
        place.copy_(out_i.transpose(0, 1))
    return whole


def _fused_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float) -> Tensor:
    """One image, (H, N, d) in and out; an image without tokens has none to give."""
    if q.shape[1] == 0:
        return q
    mask = None if bias is None else bias.expand(1, 1, q.shape[1], -1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, dropout_p=dropout, scale=scale)[0]


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

    def _gradients(self) -> AbstractContextManager[Any]:
        """As they were when the block began; nothing to switch is the usual case, and costs nothing."""
        as_begun = torch.is_grad_enabled() == self._differentiable
        return nullcontext() if as_begun else torch.set_grad_enabled(self._differentiable)

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first`` … ``last`` (of query, key, value) of the fused projection, (T, last - first, H, d); of one
        alone (T, H, d).
        """
        qkv, width, parts = self.attn.qkv, self.attn.attn_dim, last - first
        bias = None if qkv.bias is None else qkv.bias.narrow(0, first * width, parts * width)
        out = F.linear(x, qkv.weight.narrow(0, first * width, parts * width), bias)
        by_head = self.attn.num_heads, self.attn.head_dim
        return out.view(x.shape[0], *by_head) if parts == 1 else out.view(x.shape[0], parts, *by_head)

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
                    q = self._project(self.x, 0, 1) if self._fused_qkv is None else self._fused_qkv[:, 0]
                    self._all_queries = self.attn.q_norm(q)
                return self._all_queries if rows is None else self._all_queries.index_select(0, rows)
            return self.attn.q_norm(self._project(self.x.index_select(0, rows), 0, 1))

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
            logits = (by_image * q[:, None]).sum(-1).flatten(0, 1)
        else:
            logits = (keys * q[layout.row_image]).sum(-1)
        logits = logits * self.attn.scale
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
            logits = layout.pad(q).transpose(1, 2) @ layout.pad(k).permute(0, 2, 3, 1) * self.attn.scale
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
        dropout = attn.attn_drop.p if attn.training else 0.0
        if self.alive is not None or self._given is not None:
            out = self._by_map(rows, dropout)
        else:
            out = packed_attention(
                self.queries(rows), asked.keys, asked.values, queries, asked.layout,
                scale=attn.scale, key_bias=asked.key_bias, dropout=dropout,
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
