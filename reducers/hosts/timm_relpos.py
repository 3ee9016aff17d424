"""timm's ``VisionTransformerRelPos``: relative positions from a table or from a small MLP, in each block or shared.

What the MLP computes depends on the weights alone and is the same for all images, so it counts for none of them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from reducers.errors import UnsupportedModel
from reducers.hosts import SUPPORTED
from reducers.hosts.protocol import Family, HostBlock
from reducers.hosts.timm_beit import BiasedBlock, BiasedCore, BiasedHost
from reducers.hosts.timm_parts import check_attention, check_kind, check_rest, check_unreplaced
from reducers.hosts.timm_vit import PostNormed

_RESTATED = tuple((kind, kind.forward) for kind in (RelPosBlock, ResPostRelPosBlock, RelPosAttention))
_BIASES = (RelPosBias, RelPosMlp)


class RelPosCore(BiasedCore):
    """timm's ``RelPosAttention``."""

    def bias(self, shared: Tensor | None) -> Tensor | None:
        attn: Any = self.attn
        if attn.rel_pos is None:
            return shared
        own: Tensor = attn.rel_pos.get_bias()
        return own


class RelPosBlockView(BiasedBlock):
    """timm's ``RelPosBlock``."""

    core_kind: ClassVar[type[BiasedCore]] = RelPosCore


class ResPostRelPosBlockView(PostNormed, RelPosBlockView):
    """timm's ``ResPostRelPosBlock``."""


class TimmRelPos(BiasedHost):
    """timm's ``VisionTransformerRelPos``."""

    model: VisionTransformerRelPos
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformerRelPos,)
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "vision_transformer_relpos",
            "ViT with relative positions, also with norms behind attention and MLP",
            travels="its place: a bias for each pair of tokens goes by their two places",
        ),
    )

    def check_restated(self) -> None:
        check_unreplaced(*_RESTATED)
        _check_bias("the model's shared_rel_pos", self.model._modules.get("shared_rel_pos"))

    def check_block(self, index: int, block: nn.Module) -> None:
        check_kind(index, block, (RelPosBlock, ResPostRelPosBlock))
        check_attention(index, block, (RelPosAttention,))
        attn = block._modules["attn"]
        assert attn is not None
        _check_bias(f"block {index}'s attn.rel_pos", attn._modules.get("rel_pos"))
        check_rest(index, block)

    def shared_bias(self) -> Tensor | None:
        shared = self.model.shared_rel_pos
        return None if shared is None else shared.get_bias()

    def tokens(self, images: Tensor) -> Tensor:
        x: Tensor = self.model.patch_embed(images)
        if self.model.cls_token is None:
            return x
        return torch.cat([self.model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def run_own(self, block: nn.Module, x: Tensor, shared: Tensor | None) -> Tensor:
        found: Tensor = block(x, shared_rel_pos=shared)
        return found

    def block(self, index: int) -> HostBlock:
        block = self.model.blocks[index]
        return (ResPostRelPosBlockView if isinstance(block, ResPostRelPosBlock) else RelPosBlockView)(block)


HOST = TimmRelPos


def _check_bias(where: str, bias: nn.Module | None) -> None:
    if bias is not None and type(bias) not in _BIASES:
        raise UnsupportedModel(
            f"{where} is a {type(bias).__name__}, which may be no bias of pairs of places; use timm's RelPosBias or "
            f"RelPosMlp. {SUPPORTED}."
        )
