"""PS-ViT (``reducers.backbones.ps_vit``): the layers behind the sampling, which are timm's ``Block``.

The sampling layers move the points and so are a part of the embedding; blocks are numbered through all the same, and
reducers act in those with the class token. A token has no place on a grid: it lies where its point was sampled last,
and several may lie in one patch. Its number (``pos``) is that of its point, in the raster order the points start from.

Which blocks ATS was placed in by its authors, nobody knows: no public text or code says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reducers.backbones.ps_vit import PRESETS, PSViT
from reducers.cost import linear_macs
from reducers.errors import UnsupportedModel
from reducers.hosts import SUPPORTED, refuse_type
from reducers.hosts.pools import class_or_mean
from reducers.hosts.protocol import Family, Grid, Host, Stage
from reducers.hosts.timm_parts import check_attention, check_kind, check_rest, check_unreplaced, check_whole
from reducers.hosts.timm_vit import TimmBlock
from reducers.tokens import TokenBatch

_BLOCK, _ATTENTION = Block.forward, Attention.forward  # what the runtime restates
_STEPS = ("forward", "forward_features", "forward_head", "with_class_token")  # of the model, restated here


class PSViTHost(Host):
    """``PSViT``, its sampling done by itself."""

    model: PSViT
    library: ClassVar[str] = "sievit"
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "ps_vit",
            "PS-ViT: tokens sampled where the model looks (`reducers.backbones.ps_vit`)",
            travels="nothing beside the features; where each point was sampled is told to pictures",
        ),
    )

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        return list(PRESETS)

    # --- whether it can be driven ---

    def check(self) -> None:
        model = self.model
        if type(model) is not PSViT:
            refuse_type(model)
        check_whole(model, "the model")
        check_whole(model.blocks, "the model's blocks")
        if replaced := [step for step in _STEPS if step in model.__dict__]:
            raise UnsupportedModel(
                f"the model's {replaced[0]} was replaced by another function, which would be bypassed; undo that. "
                f"{SUPPORTED}."
            )
        check_unreplaced((Block, _BLOCK), (Attention, _ATTENTION))
        for index, block in enumerate(model.blocks, self.embedded):
            check_kind(index, block, (Block,))
            check_attention(index, block, (Attention,))
            check_rest(index, block)

    # --- facts ---

    @property
    def stages(self) -> tuple[Stage, ...]:
        model = self.model
        width, heads = model.embed_dim, model.heads
        return (
            Stage(0, self.embedded - 1, model.points, width, heads, prefix=0, has_class_token=False),
            Stage(self.embedded, model.depth - 1, model.points, width, heads, prefix=1, has_class_token=True),
        )

    @property
    def embedded(self) -> int:
        return len(self.model.sampling)

    @property
    def embedded_as(self) -> str:
        return "they sample the tokens, each from where its point has moved"

    @property
    def classes(self) -> int:
        return self.model.num_classes

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def read_prefix(self) -> int:
        return 1

    @property
    def channels(self) -> int:
        return self.model.in_chans

    @property
    def image_size(self) -> tuple[int, int]:
        return self.model.img_size

    # --- images ---

    def grid_of(self, images: Tensor) -> Grid:
        return self.model.points

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        model = self.model
        tokens, points = model.sampled(images)
        batch = TokenBatch.from_images(model.with_class_token(tokens), prefix=1, has_class_token=True, track=track)
        return replace(batch, lies=patches_of(points, model.points, model.map_size)) if track else batch

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        """Stem, sampling layers, places and offsets; reading the map between four cells is not counted."""
        model = self.model
        tokens = model.points[0] * model.points[1]
        rows = torch.zeros(1, tokens, model.embed_dim, dtype=self.like.dtype, device=self.like.device)
        macs = linear_macs(model.stem, images[:1])
        for layer in model.sampling:
            macs += linear_macs(layer, rows) + 2 * tokens**2 * model.embed_dim
            macs += tokens * model.point_embed.weight.numel()
        return macs

    # --- blocks ---

    def block(self, index: int) -> TimmBlock:
        block = self.model.blocks[index - self.embedded]
        assert isinstance(block, Block)  # check saw to it
        return TimmBlock(block)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch:
        layout = batch.layout
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for block in self.model.blocks[first - self.embedded : last - self.embedded]:
            x = block(x)
        return replace(batch, x=x.flatten(0, 1))

    # --- the head ---

    def classify(self, batch: TokenBatch) -> Tensor:
        logits: Tensor = self.model.head(self.pooled(batch))
        return logits

    def pooled(self, batch: TokenBatch) -> Tensor:
        return class_or_mean(batch, self.model.norm(batch.x), 1)

    @property
    def classifier_macs(self) -> int:
        head = self.model.head
        return head.weight.numel() if isinstance(head, nn.Linear) else 0

    def behind(self, block: int) -> Iterable[nn.Module]:
        yield self.model.blocks[max(block - self.embedded, 0) :]
        yield self.model.norm
        yield self.model.head


def patches_of(points: Tensor, grid: Grid, map_size: Grid) -> Tensor:
    """Points (B, N, 2) in cells of a map -> (B, N) the patch of the image, cut into ``grid``, that each lies in; those
    beyond the image count for the nearest. A point at p is at the centre of cell p.
    """
    counts = points.new_tensor(grid)
    share = (points.detach() + 0.5) / points.new_tensor(map_size)
    row, column = torch.minimum((share * counts).floor().clamp(min=0), counts - 1).long().unbind(-1)
    return row * grid[1] + column


HOST = PSViTHost
