"""Attention on packed tokens: what all models have in common, on top of what is a model's own (``Core``).

Keys and values come first, for all tokens; queries, attention rows and the projection only for the rows asked for.
Selecting rows before ``A @ V`` equals gathering them after the projection, so a pure selection never computes what
it will throw away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.errors import ReducerError
from reducers.hosts.protocol import Core
from reducers.lazy import cached_property
from reducers.masking import masked_softmax
from reducers.runtime.kernels import packed_attention
from reducers.tokens import Layout


class PackedAttention:
    """One block's attention over one batch: its parts computed when asked for, each at most once."""

    def __init__(self, core: Core, key_bias: Tensor | None, alive: Tensor | None = None, *, fold: bool = False) -> None:
        """``fold``: how the bias of keys comes in where that is a choice, see ``reducers.runtime.fold``."""
        self.core = core
        self.x = core.x  # (T, D), normed
        self.layout = core.layout
        self.keys_layout = core.keys_layout
        self.key_bias = None if key_bias is None else core.biases(key_bias)  # (K,)
        self.alive = None if alive is None else core.seen(alive)  # (K,) under a training mask
        self.fold = fold
        self._given: Tensor | None = None  # a map to attend with, in place of the softmax
        self._fused: tuple[Tensor, ...] | None = None  # query, key and value of all rows, where all will be asked for
        self._all_queries: Tensor | None = None
        # parts are shared: one that a reducer first asks for under no_grad must not lose its gradient for the rest
        self._differentiable = torch.is_grad_enabled()

    def _gradients(self) -> torch.set_grad_enabled:
        """As they were when the block began."""
        return torch.set_grad_enabled(self._differentiable)

    def use_all_queries(self) -> None:
        """Say that every row will be asked for, so that queries, keys and values take one projection."""
        if "_keys_values" not in self.__dict__:
            with self._gradients():
                self._fused = self.core.project(self.x, 0, 3)

    @cached_property
    def _keys_values(self) -> tuple[Tensor, Tensor]:
        with self._gradients():
            keys, values = self.core.project(self.x, 1, 3) if self._fused is None else self._fused[1:]
            return self.core.mix(keys, values)

    @property
    def keys(self) -> Tensor:
        return self._keys_values[0]

    @property
    def values(self) -> Tensor:
        return self._keys_values[1]

    @cached_property
    def turned_keys(self) -> Tensor:
        """Keys as the logits take them."""
        if type(self.core).turn is Core.turn:
            return self.keys
        with self._gradients():
            return self.core.turn(self.keys, None)

    @cached_property
    def pair_bias(self) -> Tensor | None:
        """As ``Core.pair_bias``."""
        if type(self.core).pair_bias is Core.pair_bias:
            return None
        with self._gradients():
            return self.core.pair_bias()

    def queries(self, rows: Tensor | None = None) -> Tensor:
        """(Tq, H, d) of the given packed rows, or of all, as the logits take them."""
        with self._gradients():
            if rows is None or self._fused is not None or self._all_queries is not None:
                if self._all_queries is None:
                    (q, *_) = self.core.project(self.x, 0, 1) if self._fused is None else self._fused
                    self._all_queries = self.core.turn(q, None)
                return self._all_queries if rows is None else self._all_queries.index_select(0, rows)
            (q,) = self.core.project(self.x.index_select(0, rows), 0, 1)
            return self.core.turn(q, rows)

    @property
    def computed_all_queries(self) -> bool:
        return self._fused is not None or self._all_queries is not None

    def row(self, rows: Tensor) -> Tensor:
        """Attention of one query an image over all its keys: rows (B,) packed -> (T, H),
        after the softmax, at least float32.
        """
        if self._given is not None:
            images = torch.arange(self.layout.images, device=rows.device)
            given = self._given[images, :, (rows - self.layout.starts).clamp(min=0)]  # (B, H, L)
            return self.layout.unpad(given.transpose(1, 2))
        layout, wide = self.keys_layout, torch.promote_types(self.x.dtype, torch.float32)
        q, keys = self.queries(rows).to(wide), self.turned_keys.to(wide)  # q: (B, H, d)
        if layout.uniform is not None:
            by_image = keys.view(layout.images, layout.uniform[0], *keys.shape[1:])
            padded = (by_image * q[:, None]).sum(-1) * self.core.scale
            if self.key_bias is not None:
                padded = padded + self.key_bias.view(layout.images, layout.uniform[0], 1)
        else:
            logits = (keys * q[layout.row_image]).sum(-1) * self.core.scale
            if self.key_bias is not None:
                logits = logits + self.key_bias[:, None]
            padded = layout.pad(logits, fill=-torch.inf)
        if self.pair_bias is not None:
            place = (rows - self.layout.starts).clamp(min=0)
            padded = padded + _rows_of(self.pair_bias, place[:, None])[:, :, 0].transpose(1, 2)
        if self.alive is None:
            return self.core.to_tokens(layout.unpad(padded.softmax(dim=1)), "share")
        seen = layout.pad(self.alive.to(wide))[..., None]
        return self.core.to_tokens(layout.unpad(masked_softmax(padded, seen, layout.valid[..., None], 1)), "share")

    def attend_with(self, attention: Tensor) -> None:
        """Sum the values by this map (B, H, L, L), whose padded places are 0, instead of the softmax."""
        if self.keys_layout is not self.layout:
            raise ReducerError("the keys of this model are no tokens, so it cannot attend with another map")
        self._given = attention

    def map(self) -> Tensor:
        """The whole attention map (B, H, L, K) over the keys, after the softmax, at least float32;
        padded places are 0.
        """
        if self._given is not None:
            return self._given
        layout, keys, wide = self.layout, self.keys_layout, torch.promote_types(self.x.dtype, torch.float32)
        q, k = self.queries().to(wide), self.turned_keys.to(wide)
        with torch.autocast(self.x.device.type, enabled=False):  # else the product would be in half precision
            logits = layout.pad(q).transpose(1, 2) @ keys.pad(k).permute(0, 2, 3, 1) * self.core.scale
        if self.key_bias is not None:
            logits = logits + keys.pad(self.key_bias)[:, None, None]
        if self.pair_bias is not None:
            logits = logits + self.pair_bias
        valid = keys.valid
        if self.alive is not None:
            seen = keys.pad(self.alive.to(wide))[:, None, None]  # (B, 1, 1, K)
            if self.core.own_key:  # a token always sees itself
                own = torch.eye(layout.longest, seen.shape[-1], dtype=wide, device=seen.device)
                seen = seen + (1 - seen) * own
            return masked_softmax(logits, seen, valid[:, None, None], -1) * layout.valid[:, None, :, None]
        if layout.uniform is not None and keys.uniform is not None:
            return logits.softmax(dim=-1)
        logits = logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1) * (layout.valid[:, None, :, None] & valid[:, None, None])

    def token_map(self) -> Tensor:
        """The map between tokens (B, H, L, L): where keys are no tokens, their columns are shared out."""
        found, layout = self.map(), self.layout
        if self.keys_layout is layout:
            return found
        columns = self.keys_layout.unpad(found.permute(0, 3, 1, 2))  # (K, H, L)
        return layout.pad(self.core.to_tokens(columns, "share")).permute(0, 2, 3, 1)

    def rows_out(self, rows: Tensor | None, queries: Layout, of: PackedAttention | None = None) -> Tensor:
        """What the attention branch adds for the given packed rows (or all), before LayerScale and DropPath: (Tq, D).

        ``of``: whose keys and values are asked, where those are another sequence's; no pair has a bias then.
        """
        asked = self if of is None else of
        if self.alive is not None or self._given is not None:
            out = self._by_map(rows, self.core.dropout)
        else:
            pair_bias = self.pair_bias if of is None else None
            if pair_bias is not None and rows is not None:
                pair_bias = _rows_of(pair_bias, queries.pad(self.layout.row_index[rows]))
            out = packed_attention(
                self.queries(rows), asked.turned_keys, asked.values, queries, asked.keys_layout,
                scale=self.core.scale, key_bias=asked.key_bias, dropout=self.core.dropout, pair_bias=pair_bias,
                fold=asked.fold,
            ).flatten(1)  # fmt: skip
        return self.core.out(out, rows)

    def _by_map(self, rows: Tensor | None, dropout: float) -> Tensor:
        """``A @ V`` by the whole map, under a training mask or with a given map: (Tq, H d)."""
        layout, v = self.layout, self.values
        weights = F.dropout(self.map().to(v.dtype), dropout)
        out = layout.unpad((weights @ self.keys_layout.pad(v).transpose(1, 2)).transpose(1, 2)).flatten(1)
        return out if rows is None else out.index_select(0, rows)


def _rows_of(pair_bias: Tensor, places: Tensor) -> Tensor:
    """The rows (B, H, Q, L) of a pair bias at some places (B, Q) of each image."""
    images, heads, keys = len(places), pair_bias.shape[1], pair_bias.shape[3]
    index = places[:, None, :, None].expand(-1, heads, -1, keys)
    return pair_bias.expand(images, -1, -1, -1).gather(2, index)
