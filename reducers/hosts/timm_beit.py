"""timm's ``Beit``: BEiT, BEiT v2. Each pair of tokens takes along the bias of its two places."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.models.beit import Attention, Beit, Block, RelativePositionBias
from torch import Tensor, nn

from reducers.cost import BlockCost
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts import SUPPORTED
from reducers.hosts.pair_bias import Places, by_place
from reducers.hosts.protocol import Family, Grid, HostBlock
from reducers.hosts.timm_parts import (
    TimmHost,
    check_attention,
    check_kind,
    check_rest,
    check_unreplaced,
    fused_parts,
    mlp_row,
)
from reducers.hosts.timm_vit import GammaScaled, TimmBlock, TimmCore
from reducers.tokens import TokenBatch

_RESTATED = ((Block, Block.forward), (Attention, Attention.forward))


class BiasedCore(TimmCore):
    """An attention of timm with one projection and a bias for each pair of places."""

    def __init__(self, attn: Any, x: Tensor, batch: TokenBatch) -> None:
        super().__init__(attn, x, batch.layout)
        self.batch = batch

    @property
    def scale(self) -> float:
        """timm's fused kernel goes by the head's width whatever ``attn.scale`` says."""
        attn: Any = self.attn
        width = attn.qkv.out_features // (3 * attn.num_heads)
        return float(width**-0.5 if attn.fused_attn else attn.scale)

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn: Any = self.attn
        found = [part.unflatten(-1, (attn.num_heads, -1)) for part in fused_parts(attn, x, first, last)]
        norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm", "none")[first:last]]
        return tuple(part if norm is None else norm(part) for part, norm in zip(found, norms, strict=True))

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        added: Tensor = self.attn.proj_drop(self.attn.proj(summed))
        return added

    def pair_bias(self) -> Tensor | None:
        places: Places = self.batch.tables
        bias = self.bias(places.shared)
        return None if bias is None else by_place(bias, self.batch, places)

    def bias(self, shared: Tensor | None) -> Tensor | None:
        """(1, H, P + N0, P + N0) of this block, with what all blocks share."""
        attn: Any = self.attn
        if attn.relative_position_bias_table is None:
            return shared
        own: Tensor = attn._get_rel_pos_bias()
        return own if shared is None else own + shared


class BiasedBlock(TimmBlock):
    """A block of timm around such an attention."""

    module: Any
    core_kind: ClassVar[type[BiasedCore]] = BiasedCore

    @property
    def cost(self) -> BlockCost:
        attn = self.module.attn
        linear, width = attn.qkv.weight.numel() // 3, attn.qkv.out_features // 3
        return BlockCost(linear, 2 * linear, width, attn.proj.weight.numel(), mlp_row(self.mlp))

    def attention(self, x: Tensor, batch: TokenBatch) -> BiasedCore:
        return self.core_kind(self.module.attn, x, batch)


class BeitBlock(GammaScaled, BiasedBlock):
    """timm's ``beit.Block``."""


class BiasedHost(TimmHost):
    """A model of timm whose biases are made for one grid."""

    blocks_in: ClassVar[type[nn.Module]] = nn.ModuleList

    @property
    def mean_places(self) -> str | None:
        return "its relative positions are known between whole places alone"

    @property
    def class_token(self) -> bool:
        return self.model.cls_token is not None

    @abstractmethod
    def shared_bias(self) -> Tensor | None:
        """(1, H, P + N0, P + N0) what all blocks add."""

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """(B, P + N0, D) what enters block 0."""

    @abstractmethod
    def run_own(self, block: nn.Module, x: Tensor, shared: Tensor | None) -> Tensor:
        """timm's own block, on whole images."""

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        raise ReducerError(
            f"images cannot be resized for {type(self.model).__name__}, whose relative positions are those of one "
            "grid; use the model at another size: model.set_input_size(…)"
        )

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        assert not resized  # whole_patches saw to it
        prefix, x = int(self.model.num_prefix_tokens), self.tokens(images)
        batch = TokenBatch.from_images(x, prefix=prefix, has_class_token=self.class_token, track=True)
        assert batch.pos is not None
        return replace(batch, tables=Places(batch.pos, prefix, self.shared_bias()))

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout, places = batch.layout, batch.tables
        if batch.pos is not places.untouched or not layout.rows:  # timm's blocks add the bias of the whole grid
            return None
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for index in range(first, last):
            x = self.run_own(self.model.blocks[index], x, places.shared)
        return replace(batch, x=x.flatten(0, 1))


class TimmBeit(BiasedHost):
    """timm's ``Beit``."""

    model: Beit
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (Beit,)
    families: ClassVar[tuple[Family, ...]] = (
        Family("beit", "BEiT, BEiT v2", travels="its place: a bias for each pair of tokens goes by their two places"),
    )

    def check_restated(self) -> None:
        check_unreplaced(*_RESTATED)
        shared = self.model._modules.get("rel_pos_bias")
        if shared is not None and type(shared) is not RelativePositionBias:
            raise UnsupportedModel(
                f"the model's relative positions are a {type(shared).__name__}, which may be no bias of pairs; use "
                f"timm's RelativePositionBias. {SUPPORTED}."
            )

    def check_block(self, index: int, block: nn.Module) -> None:
        check_kind(index, block, (Block,))
        check_attention(index, block, (Attention,))
        check_rest(index, block)

    def shared_bias(self) -> Tensor | None:
        shared = self.model.rel_pos_bias
        return None if shared is None else shared()[None]

    def tokens(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.patch_embed(images)
        x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x if model.pos_embed is None else x + model.pos_embed
        tokens: Tensor = model.pos_drop(x)
        return tokens

    def run_own(self, block: nn.Module, x: Tensor, shared: Tensor | None) -> Tensor:
        found: Tensor = block(x, shared_rel_pos_bias=shared)
        return found

    def block(self, index: int) -> HostBlock:
        return BeitBlock(self.model.blocks[index])


HOST = TimmBeit
