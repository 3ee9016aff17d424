"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, LingBot, Sapiens2.

A token takes its place along: queries and keys are turned by the row of the place (``rope``), in some models by another
in each block and head. Keys and values may be fewer than queries (grouped): reducers see each under every head that it
serves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from reducers.cost import BlockCost, linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts import SUPPORTED
from reducers.hosts.protocol import Family, Grid, HostBlock
from reducers.hosts.rope import Rope, Turning, with_centroids
from reducers.hosts.timm_parts import (
    TimmHost,
    check_attention,
    check_kind,
    check_rest,
    check_unreplaced,
    entrance,
    fused_parts,
    mlp_row,
)
from reducers.hosts.timm_vit import GammaScaled, PostNormed, TimmCore
from reducers.tokens import TokenBatch

_RESTATED = tuple((kind, kind.forward) for kind in (EvaBlock, EvaBlockPostNorm, EvaAttention, AttentionRope))
_BLOCKS, _ATTENTIONS = (EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope)
_ROPES = ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed", "RotaryEmbeddingMRope")
_BY_COORDINATES = _ROPES[:3]


class EvaCore(Turning, TimmCore):
    """timm's ``EvaAttention`` and ``AttentionRope``: one projection or three, grouped keys, rope."""

    def __init__(self, attn: Any, x: Tensor, batch: TokenBatch, block: int) -> None:
        super().__init__(attn, x, batch.layout)
        self.batch = batch
        self.block = block

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn: Any = self.attn
        if attn.qkv is None:
            found = [projection(x) for projection in (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]]
        else:
            found = [*fused_parts(attn, x, first, last)]
        norms = (attn.q_norm, attn.k_norm, None)[first:last]
        return tuple(self._by_head(part, norm) for part, norm in zip(found, norms, strict=True))

    def _by_head(self, part: Tensor, norm: nn.Module | None) -> Tensor:
        """(T, heads of queries, d)."""
        part = part.unflatten(-1, (-1, self.attn.head_dim))
        if norm is not None:
            part = norm(part)
        groups = self.attn.num_heads // part.shape[1]
        return part if groups == 1 else part.repeat_interleave(groups, dim=1)


class EvaBlockView(GammaScaled):
    """timm's ``EvaBlock``."""

    module: Any

    def __init__(self, module: nn.Module, index: int) -> None:
        super().__init__(module)
        self.index = index

    @property
    def cost(self) -> BlockCost:
        attn = self.module.attn
        if attn.qkv is None:
            query_row, key_row = attn.q_proj.weight.numel(), attn.k_proj.weight.numel() + attn.v_proj.weight.numel()
        else:
            query_row = attn.qkv.weight.numel() // 3
            key_row = 2 * query_row
        output_row = attn.proj.weight.numel() + (0 if attn.gate is None else attn.gate.weight.numel())
        return BlockCost(query_row, key_row, attn.head_dim * attn.num_heads, output_row, mlp_row(self.mlp))

    def attention(self, x: Tensor, batch: TokenBatch) -> EvaCore:
        return EvaCore(self.module.attn, x, batch, self.index)


class EvaPostNormView(PostNormed, EvaBlockView):
    """timm's ``EvaBlockPostNorm``."""


class RopedHost(TimmHost):
    """A model of timm whose blocks are turned by places, or may be."""

    def check_rope(self) -> None:
        """Refuse a rope that may ask for more than places."""
        rope = self.model._modules.get("rope")
        if rope is not None and not _is_known(rope):
            raise UnsupportedModel(
                f"the model turns queries and keys by a {type(rope).__name__}, which may ask for more than places; "
                f"create it with a rope_type of timm's own. {SUPPORTED}."
            )

    @property
    def mean_places(self) -> str | None:
        rope = self.model._modules.get("rope")
        if rope is None:
            return super().mean_places
        if type(rope).__name__ not in _BY_COORDINATES:
            return f"its {type(rope).__name__} is known at whole places alone"
        return None

    def turned_by(self, rows: Tensor | None, x: Tensor, grid: Grid, *, track: bool) -> TokenBatch:
        """The tokens x (B, N, D) that enter block 0, with timm's table of rows ([depth, H,] N0, 2 d) for this pass."""
        model, known = self.model, track or rows is not None
        batch = TokenBatch.from_images(
            x, prefix=int(model.num_prefix_tokens), has_class_token=self.class_token, track=known
        )
        if rows is None:
            return batch
        by_place = rows.transpose(-3, -2) if rows.dim() == 4 else rows[:, None]
        half, at = bool(getattr(model.blocks[0].attn, "rotate_half", False)), None
        if self.places == "mean":
            at = _by_coordinates(model.rope)
            batch = with_centroids(batch, _coordinates(model.rope, grid, x.device))
        return replace(batch, tables=Rope.of(by_place, batch, half=half, at=at))

    def relocated(self, tables: Rope | None, original: Tensor, patches: int) -> Rope | None:
        return None if tables is None else tables.relocated(original, patches)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        """timm's own blocks, with the rows of the patches that are left."""
        layout, prefix, blocks = batch.layout, int(self.model.num_prefix_tokens), self.model.blocks
        assert layout.uniform is not None
        if layout.uniform[1] != prefix or not layout.rows:
            return None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for index in range(first, last):
            rows = _left(batch, index, prefix)
            x = blocks[index](x) if rows is None else blocks[index](x, rope=rows)
        return replace(batch, x=x.flatten(0, 1))


class TimmEva(RopedHost):
    """timm's ``Eva``."""

    model: Eva
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (Eva,)
    blocks_in: ClassVar[type[nn.Module]] = nn.ModuleList
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "eva",
            "EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, LingBot, Sapiens2",
            travels="its place, by which queries and keys are turned (rope)",
        ),
    )

    def check_restated(self) -> None:
        check_unreplaced(*_RESTATED)
        self.check_rope()

    def check_block(self, index: int, block: nn.Module) -> None:
        check_kind(index, block, _BLOCKS)
        check_attention(index, block, _ATTENTIONS)
        check_rest(index, block)

    @property
    def class_token(self) -> bool:
        return self.model.cls_token is not None

    @property
    def pools_prefix(self) -> bool:
        """The attention pool reads all tokens, the other pools the patches."""
        return bool(self.model.global_pool == "map")

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        model, none = _entrance(self.model, resized=resized), images.shape[0] == 0
        grid = self.grid_of(images)
        if none:  # timm cannot tell how many positions to interpolate for
            images = images.new_zeros(1, *images.shape[1:])
        x, rows = model._pos_embed(model.patch_embed(images))
        return self.turned_by(rows, model.norm_pre(x[:0] if none else x), grid, track=track)

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return linear_macs(_entrance(self.model, resized=resized).patch_embed, images[:1])

    def block(self, index: int) -> HostBlock:
        block = self.model.blocks[index]
        kind = EvaPostNormView if isinstance(block, EvaBlockPostNorm) else EvaBlockView
        return kind(block, index)


HOST = TimmEva


def _left(batch: TokenBatch, block: int, prefix: int) -> Tensor | None:
    """The rows by which timm's block turns the patches of a batch, in a shape that it takes."""
    rope, layout = batch.tables, batch.layout
    if rope is None:
        return None
    if batch.pos is rope.untouched:
        return rope.of_block(block)[:-1].transpose(0, 1)  # (H or 1, N, 2 d)
    assert layout.uniform is not None
    rows = rope.rows(batch, block)
    by_image = rows.view(layout.images, layout.uniform[0], *rows.shape[1:])
    return by_image[:, prefix:].transpose(1, 2)  # (B, H or 1, N, 2 d)


def _is_known(rope: nn.Module) -> bool:
    return type(rope).__name__ in _ROPES and type(rope).__module__.startswith("timm.layers.")


def _entrance(base: Any, *, resized: bool) -> Any:
    """As ``entrance``; the rope of a twin makes its rows for the images' own grid."""
    twin = entrance(base, resized=resized)
    if twin is not base and base.rope is not None:
        rope = copy.copy(base.rope)
        rope._use_cached_embed = False  # of the one kind that goes by its cache even where it is told a grid
        twin._modules["rope"] = rope
    return twin


# --- rope at any coordinates ------------------------------------------------------------------------------------------


def _coordinates(rope: Any, grid: Grid, device: torch.device) -> Tensor:
    """(N0, 2) what timm's rope multiplies its frequencies by, at each place of a grid."""
    if rope.training and rope.aug_active:
        raise ReducerError(
            "places='mean' takes coordinates as they are, and the model's rope moves them in training; train with "
            "places='heaviest', or set model.rope.aug_active = False"
        )
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    if type(rope).__name__ == "RotaryEmbeddingDinoV3":
        over = {"max": (max(grid),) * 2, "min": (min(grid),) * 2}.get(rope.normalize_coords, grid)
        axes = [2 * (axis + 0.5 + rope.grid_offset) / n - 1 for axis, n in zip(axes, over, strict=True)]
    elif type(rope).__name__ == "RotaryEmbeddingCat":
        if rope.in_pixels:
            axes = [torch.linspace(-1, 1, n, device=device) for n in grid]
        else:
            axes = [axis + rope.grid_offset for axis in axes]
        if rope.ref_feat_shape is not None:
            axes = [axis / n * of for axis, n, of in zip(axes, grid, rope.ref_feat_shape, strict=True)]
    found = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return found.flip(-1) if rope.grid_indexing == "xy" else found


def _by_coordinates(rope: Any) -> Callable[[Tensor, int], Tensor]:
    """Coordinates (T, 2) and a block -> sines and cosines (T, H or 1, 2 d)."""
    if type(rope).__name__ == "RotaryEmbeddingMixed":
        return partial(_mixed_rows, rope)
    return partial(_axial_rows, rope)


def _axial_rows(rope: Any, at: Tensor, block: int) -> Tensor:
    if type(rope).__name__ == "RotaryEmbeddingDinoV3":
        angles = 2 * math.pi * at[:, :, None] / rope.periods
    else:
        angles = at[:, :, None] * rope.bands
    return _laid_out(angles.flatten(1), half=rope.rotate_half)[:, None]


def _mixed_rows(rope: Any, at: Tensor, block: int) -> Tensor:
    across, down = rope.freqs[:, block].float()  # (H, d / 2) each
    return _laid_out(at[:, :1, None] * across + at[:, 1:, None] * down, half=False)


def _laid_out(angles: Tensor, *, half: bool) -> Tensor:
    """Sines, then cosines, of angles (..., d / 2), each for both features of a pair: (..., 2 d)."""
    angles = torch.cat([angles, angles], dim=-1) if half else angles.repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
