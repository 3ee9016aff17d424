"""timm's ``NaFlexVit``, on images of one size (B, C, H, W): its own embedding and head around blocks of ViT or EVA.

Images of any size are taken as they are, positions interpolated. timm's dictionaries of ready patches are not: tokens
are packed here anyway.
"""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import AttentionRope
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reducers.errors import ReducerError
from reducers.hosts.protocol import Family, Grid, HostBlock
from reducers.hosts.timm_eva import EvaBlockView, RopedHost
from reducers.hosts.timm_parts import check_attention, check_kind, check_rest, check_unreplaced
from reducers.hosts.timm_vit import TimmBlock
from reducers.tokens import TokenBatch

_RESTATED = tuple((kind, kind.forward) for kind in (Block, Attention, EvaBlock, EvaAttention, AttentionRope))


class TimmNaFlex(RopedHost):
    """timm's ``NaFlexVit``."""

    model: NaFlexVit
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (NaFlexVit,)
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "naflexvit",
            "NaFlex: ViT, SigLIP 2 and RADIO at any image size",
            travels="nothing beside the features, or with rope its place",
        ),
    )

    def check_restated(self) -> None:
        check_unreplaced(*_RESTATED)
        self.check_rope()

    def check_block(self, index: int, block: nn.Module) -> None:
        check_kind(index, block, (Block, EvaBlock))
        check_attention(index, block, (Attention,) if type(block) is Block else (EvaAttention, AttentionRope))
        check_rest(index, block)

    @property
    def patcher(self) -> Any:
        return self.model.embeds

    @property
    def takes_sizes(self) -> bool:
        return True

    @property
    def own_grid(self) -> Grid | None:
        size = self._size
        return None if size is None else self._grid(*size)

    @property
    def pools_prefix(self) -> bool:
        return bool(self.model.pool_include_prefix)

    @property
    def channels(self) -> int:
        return int(self.model.in_chans)

    @property
    def image_size(self) -> tuple[int, int]:
        size = self._size
        if size is None:
            raise ReducerError("the model has no image size of its own; create it with img_size=…")
        return size

    @property
    def _size(self) -> tuple[int, int] | None:
        """As it was created, or as its weights were trained, or as it has positions for."""
        embeds: Any = self.model.embeds
        trained = (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size")
        if embeds.default_img_size is not None:
            height, width = embeds.default_img_size
        elif trained is not None:
            _, height, width = trained
        elif embeds.pos_embed_grid_size is not None:
            height, width = (n * m for n, m in zip(embeds.pos_embed_grid_size, embeds.patch_size, strict=True))
        else:
            return None
        return int(height), int(width)

    def grid_of(self, images: Tensor) -> Grid:
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ReducerError(
                "the reduced NaFlexVit takes images (B, C, H, W), and no ready patches; images of different sizes go "
                "in batch by batch"
            )
        return self._grid(int(images.shape[-2]), int(images.shape[-1]))

    def _grid(self, height: int, width: int) -> Grid:
        rows, columns = self.model.embeds.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        model: Any = self.model
        x, grid = model.embeds(images)
        rows = None if model.rope is None else model.rope.get_embed(shape=grid)
        return self.turned_by(rows, model.norm_pre(x), self.grid_of(images), track=track)

    def block(self, index: int) -> HostBlock:
        block = self.model.blocks[index]
        return TimmBlock(block) if isinstance(block, Block) else EvaBlockView(block, index)


HOST = TimmNaFlex
