"""Attention of queries over keys on packed tokens, by whichever way is fastest on the device it runs on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.recording import recording
from reducers.runtime.fold import folded_keys, folded_queries, folded_values, folded_width
from reducers.tokens import Layout

varlen_attn: Any
try:  # flash attention over packed rows; older torch has none, and pads and masks instead
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
_VARLEN_TAKES_A_SCALE = varlen_attn is not None and "scale" in inspect.signature(varlen_attn).parameters
_HALF = (torch.float16, torch.bfloat16)


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
    pair_bias: Tensor | None = None,
    fold: bool = False,
) -> Tensor:
    """Attention of each image's queries over that image's keys, fused. q: (Tq, H, d),
    k and v: (Tk, H, d) -> (Tq, H, d).

    Added to the logits: ``key_bias`` (Tk,) of each key, ``pair_bias`` (B or 1, H or 1, Lq, Lk), padded, of each pair.
    ``fold``: in half precision on a GPU ``key_bias`` goes into the products (``reducers.runtime.fold``).
    """
    if fold and key_bias is not None and pair_bias is None and _fold_takes(q, queries, keys, dropout):
        return folded_attention(q, k, v, queries, keys, scale=scale, key_bias=key_bias, dropout=dropout)
    if queries.uniform is not None and keys.uniform is not None:
        faster = _products_are_faster(q, keys.uniform[0], dropout)
        if faster and keys.images == 1:
            bias = None if key_bias is None else key_bias.to(q.dtype)
            if pair_bias is not None:
                bias = _sum(bias, pair_bias[0].to(q.dtype))
            return _one_by_products(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), bias, scale).transpose(
                0, 1
            )
        mask = None if key_bias is None else key_bias.view(keys.images, 1, 1, keys.uniform[0]).to(q.dtype)
        if pair_bias is not None:
            mask = _sum(mask, pair_bias.to(q.dtype)).expand(keys.images, -1, -1, -1)
        by_image = (
            q.view(queries.images, queries.uniform[0], *q.shape[1:]),
            k.view(keys.images, keys.uniform[0], *k.shape[1:]),
            v.view(keys.images, keys.uniform[0], *v.shape[1:]),
        )
        if faster:
            return _by_products(*by_image, mask, scale).view(q.shape)
        return _fused(*by_image, mask, scale, dropout).reshape(q.shape)
    if q.device.type == "cpu" and not _many_and_short(q, queries, keys):
        biases = _by_image(key_bias, pair_bias, queries, keys, q.dtype)
        return _image_by_image(q, k, v, queries, keys, scale, biases, dropout)
    if key_bias is None and pair_bias is None and dropout == 0 and _varlen_takes(q):
        return _varlen(q, k, v, queries, keys, scale)
    valid = keys.valid
    bias = (
        torch.zeros(valid.shape, dtype=q.dtype, device=q.device) if key_bias is None else keys.pad(key_bias.to(q.dtype))
    )
    # a finished image has no key at all: leaving its (padded, unread) rows open keeps the softmax free of NaN
    mask = bias.masked_fill(~valid & (keys.lengths > 0)[:, None], -torch.inf)[:, None, None]
    if pair_bias is not None:
        mask = mask + pair_bias.to(q.dtype)
    return queries.unpad(_fused(queries.pad(q), keys.pad(k), keys.pad(v), mask, scale, dropout))


def _many_and_short(q: Tensor, queries: Layout, keys: Layout) -> bool:
    """Whether all at once, padded, costs less on a CPU than a call for each: windows and short frames do."""
    longest = max(queries.longest, keys.longest)
    return keys.images >= MANY and longest * q.shape[1] * q.shape[2] <= SHORT


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def _by_image(
    key_bias: Tensor | None, pair_bias: Tensor | None, queries: Layout, keys: Layout, dtype: torch.dtype
) -> list[Tensor | None]:
    """What is added to each image's logits: (K,), (H, Q, K) or nothing."""
    found: list[Tensor | None] = [None] * keys.images
    if key_bias is not None:
        found = [*key_bias.to(dtype).split(keys.counts)]
    if pair_bias is not None:
        padded = pair_bias.to(dtype).expand(keys.images, -1, -1, -1)
        pairs = (padded[i, :, :q, :k] for i, (q, k) in enumerate(zip(queries.counts, keys.counts, strict=True)))
        found = [_sum(own, pair) for own, pair in zip(found, pairs, strict=True)]
    return found


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
    return keys in MEDIUM and not recording()


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
    if varlen_attn is None or q.dtype not in _HALF or not q.is_cuda:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, scale: float) -> Tensor:
    """Flash attention on the packed rows themselves: no padding, and no wait for the device."""
    natural = q.shape[-1] ** -0.5  # the kernel's own
    told: dict[str, float] = {}
    if scale != natural:
        if _VARLEN_TAKES_A_SCALE:
            told["scale"] = scale
        else:
            q = q * (scale / natural)
    out: Tensor = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), queries.offsets, keys.offsets, queries.longest, keys.longest,
        **told,
    )  # fmt: skip
    return out


def _fold_takes(q: Tensor, queries: Layout, keys: Layout, dropout: float) -> bool:
    """Whether flash attention is there for what has no mask left: in half precision on a GPU, and of images of
    different lengths only over packed rows.
    """
    if not q.is_cuda or q.dtype not in _HALF:
        return False
    return (queries.uniform is not None and keys.uniform is not None) or (dropout == 0 and _varlen_takes(q))


def folded_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, *, scale: float, key_bias: Tensor,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """As ``packed_attention`` with a ``key_bias``, which goes into the products: the kernel sees no mask."""
    width = q.shape[-1]
    if queries.uniform is None or keys.uniform is None:
        natural = folded_width(width) ** -0.5
        if q.is_cuda and not _VARLEN_TAKES_A_SCALE and scale != natural:  # of the queries, and not of the ones
            q, scale = q * (scale / natural), natural
        wide = folded_queries(q), folded_keys(k, key_bias, scale), folded_values(v)
        if q.is_cuda:
            return _varlen(*wide, queries, keys, scale)[..., :width]
        return _image_by_image(*wide, queries, keys, scale, [None] * keys.images, dropout)[..., :width]
    by_image = (
        folded_queries(q.view(queries.images, queries.uniform[0], *q.shape[1:])),
        folded_keys(k.view(keys.images, keys.uniform[0], *k.shape[1:]), key_bias.view(keys.images, -1), scale),
        folded_values(v.view(keys.images, keys.uniform[0], *v.shape[1:])),
    )
    return _fused(*by_image, None, scale, dropout)[..., :width].reshape(q.shape)


MANY, SHORT = 16, 5000
"""From how many images or windows on, and up to how many numbers of queries in the longest, padding beats a call for
each (measured with and without gradients, 1 to 12 heads of 16 to 64, 8 to 197 tokens, 4 to 1,024 of them, two threads:
at 16 tokens of 3 heads 2 to 3.5 times as fast, level at 49 of 3 x 32, half as fast at 197). A gradient through a call
for each also fills a whole tensor for each: 4,096 windows of a small Swin trained 17 times slower than all at once."""
SMALL = 256
"""Keys up to which an image's attention on a CPU is two plain matrix products: up to 20 % faster than the fused kernel,
whose blocks are made for longer rows (measured: DeiT-Ti and S, 40-197 tokens, two threads). Grouping such images by
length with padding and a key mask was slower than either."""


@torch.compiler.disable  # it would be written out once for every image, and again for every new set of lengths
def _image_by_image(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Layout,
    keys: Layout,
    scale: float,
    biases: list[Tensor | None],
    dropout: float,
) -> Tensor:
    """On a CPU a call for each of a few long images costs less than padding would: nothing is copied,
    nothing is multiplied in vain.
    """
    plain = dropout == 0 and not recording() and q.dtype in (torch.float32, torch.float64)
    by_head = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # (H, T, d)
    counts = queries.counts, keys.counts, keys.counts
    parts = zip(*(x.split(n, dim=1) for x, n in zip(by_head, counts, strict=True)), strict=True)
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
    mask = None if bias is None else bias.expand(1, 1 if bias.dim() == 1 else -1, q.shape[1], -1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, dropout_p=dropout, scale=scale)[0]
