"""timm's VisionTransformer: ViT, DeiT, CLIP, SigLIP, DINOv2, … where it is built of plain ``Block`` with ``Attention``.

Restated exactly, and told by type, never by name. The checks take about 50 microseconds for twelve blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.cost import BlockCost, linear_macs
from reducers.hosts.pools import class_or_mean
from reducers.hosts.protocol import Core, Family, HostBlock, PreNormBlock, StochasticDepth
from reducers.hosts.timm_parts import (
    TimmHost,
    attention_dropout,
    check_attention,
    check_kind,
    check_rest,
    check_unreplaced,
    entrance,
    mlp_row,
    stochastic_depth,
)
from reducers.tokens import Layout, TokenBatch

_BLOCK, _ATTENTION = Block.forward, Attention.forward  # what the runtime restates


class TimmCore(Core):
    """timm's ``Attention``, every optional part honoured."""

    def __init__(self, attn: Attention, x: Tensor, layout: Layout) -> None:
        super().__init__(x, layout)
        self.attn = attn

    @property
    def scale(self) -> float:
        """timm's fused kernel goes by the head's width whatever ``attn.scale`` says."""
        attn = self.attn
        return float(attn.head_dim**-0.5 if attn.fused_attn else attn.scale)

    @property
    def dropout(self) -> float:
        return attention_dropout(self.attn)

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn, parts = self.attn, last - first
        qkv, width = attn.qkv, attn.attn_dim
        bias = None if qkv.bias is None else qkv.bias.narrow(0, first * width, parts * width)
        out = F.linear(x, qkv.weight.narrow(0, first * width, parts * width), bias)
        found = out.view(x.shape[0], parts, attn.num_heads, attn.head_dim).unbind(1)
        norms = (attn.q_norm, attn.k_norm)[first:last]
        return (*(norm(part) for norm, part in zip(norms, found, strict=False)), *found[len(norms) :])

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        attn = self.attn
        out = attn.norm(summed)
        if attn.gate is not None:
            out = out * attn.gate(self.x if rows is None else self.x.index_select(0, rows)).sigmoid()
        added: Tensor = attn.proj_drop(attn.proj(out))
        return added


class TimmBlock(PreNormBlock):
    """timm's ``Block``."""

    module: Block
    trusted: ClassVar[tuple[str, ...]] = ("torch.nn.modules.", "timm.layers.")

    @property
    def cost(self) -> BlockCost:
        attn: Any = self.module.attn
        linear = attn.qkv.in_features * attn.attn_dim
        output_row = linear * (2 if attn.gate is not None else 1)
        return BlockCost(linear, 2 * linear, attn.attn_dim, output_row, mlp_row(self.mlp))

    def norm(self, branch: int) -> nn.Module:
        norm: nn.Module = self.module.norm2 if branch else self.module.norm1
        return norm

    def scale(self, branch: int) -> Callable[[Tensor], Tensor]:
        scale: nn.Module = self.module.ls2 if branch else self.module.ls1
        return scale

    def depth(self, branch: int) -> StochasticDepth | None:
        return stochastic_depth(self.module.drop_path2 if branch else self.module.drop_path1)

    @property
    def mlp(self) -> nn.Module:
        mlp: nn.Module = self.module.mlp
        return mlp

    def attention(self, x: Tensor, batch: TokenBatch) -> TimmCore:
        attn = self.module.attn
        assert isinstance(attn, Attention)  # check saw to it
        return TimmCore(attn, x, batch.layout)

    def attention_ends(self) -> tuple[nn.Module, ...]:
        attn: Any = self.module.attn
        return attn.proj, attn.proj_drop


class GammaScaled(TimmBlock):
    """A block of timm whose branches are scaled by ``gamma_1`` and ``gamma_2``, where it has them."""

    module: Any

    def scale(self, branch: int) -> Callable[[Tensor], Tensor] | None:  # type: ignore[override]  # not all have one
        gamma = self.module.gamma_2 if branch else self.module.gamma_1
        return None if gamma is None else lambda added: gamma * added


class PostNormed(TimmBlock):
    """A block of timm with norms behind its branches: ``x + norm1(attention(x)); x + norm2(mlp(x))``."""

    module: Any

    def norm(self, branch: int) -> nn.Module:
        return nn.Identity()

    def scale(self, branch: int) -> nn.Module:
        norm: nn.Module = self.module.norm2 if branch else self.module.norm1
        return norm


class TimmViT(TimmHost):
    """timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

    model: VisionTransformer
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, VisionTransformerDistilled)
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "vision_transformer",
            "ViT, AugReg, CLIP, SigLIP, DINOv2, registers",
            refused={
                "attention and MLP side by side": (
                    "vit_base_patch16_18x2_224",
                    "vit_base_patch16_xp_224",
                    "vit_dpwee_patch16_reg1_gap_256",
                    "vit_huge_patch14_xp_224",
                    "vit_large_patch14_xp_224",
                    "vit_pwee_patch16_reg1_gap_256",
                    "vit_small_patch16_18x2_224",
                ),
                "norms behind attention and MLP": ("vit_base_patch16_rpn_224",),
                "differential attention": ("vit_dlittle_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"),
            },
        ),
        Family("deit", "DeiT, distilled DeiT, DeiT-III"),
        Family("vision_transformer_hybrid", "patches from a convolutional network"),
        Family("vitamin", "ViTamin: patches from a convolutional network, GeGLU in the MLP"),
    )

    def check_restated(self) -> None:
        check_unreplaced((Block, _BLOCK), (Attention, _ATTENTION))

    def check_block(self, index: int, block: nn.Module) -> None:
        """Block, attention and qkv are restated, not called: whatever would change them must be seen here."""
        check_kind(index, block, (Block,))
        check_attention(index, block, (Attention,))
        check_rest(index, block)

    @property
    def read_prefix(self) -> int | None:
        """Class and distillation token; registers are read by nobody."""
        if self.model.global_pool != "token":
            return None
        return int(self.model.num_prefix_tokens) - int(self.model.num_reg_tokens)

    @property
    def pools_prefix(self) -> bool:
        return bool(self.model.pool_include_prefix)

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        model = self.model
        x = _embed(entrance(model, resized=resized), images)
        return TokenBatch.from_images(
            x, prefix=model.num_prefix_tokens, has_class_token=model.has_class_token, track=track
        )

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return linear_macs(entrance(self.model, resized=resized).patch_embed, images[:1])

    def block(self, index: int) -> HostBlock:
        block = self.model.blocks[index]
        assert isinstance(block, Block)  # check saw to it
        return TimmBlock(block)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout = batch.layout
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for block in self.model.blocks[first:last]:
            x = block(x)
        return replace(batch, x=x.flatten(0, 1))

    def classify(self, batch: TokenBatch) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(self.model, VisionTransformerDistilled):
            return _classify_distilled(self.model, batch, self.model.norm(batch.x))
        logits: Tensor = super().classify(batch)
        return logits

    def pooled(self, batch: TokenBatch) -> Tensor:
        """As ``forward_head(…, pre_logits=True)``: of class and distillation token the mean."""
        if isinstance(self.model, VisionTransformerDistilled):
            first, second = _both(self.model, batch, self.model.norm(batch.x))
            return (first + second) / 2
        return super().pooled(batch)

    @property
    def classifier_macs(self) -> int:
        base = self.model
        heads = [base.head, base.head_dist] if isinstance(base, VisionTransformerDistilled) else [base.head]
        return sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))


HOST = TimmViT


# --- images -> tokens -------------------------------------------------------------------------------------------------


def _embed(base: VisionTransformer, images: Tensor) -> Tensor:
    """Images -> the tokens that enter block 0, (B, N, D)."""
    if base.dynamic_img_size and images.shape[0] == 0:  # timm cannot tell how many positions to interpolate for
        return _embed(base, images.new_zeros(1, *images.shape[1:]))[:0]
    return base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))


# --- tokens -> logits -------------------------------------------------------------------------------------------------


def _both(base: VisionTransformerDistilled, batch: TokenBatch, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the heads of class and distillation token read."""
    first = class_or_mean(batch, x, int(base.num_prefix_tokens))
    second = x[batch.layout.starts + (batch.cls >= 0)]  # next to the class token, or first where that was dropped
    return base.head_drop(first), base.head_drop(second)


def _classify_distilled(
    base: VisionTransformerDistilled, batch: TokenBatch, x: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Class and distillation token each have a head; their logits are averaged, as timm does outside distilled
    training.
    """
    first, second = _both(base, batch, x)
    by_class, by_distillation = base.head(first), base.head_dist(second)
    if base.distilled_training and base.training:
        return by_class, by_distillation
    return (by_class + by_distillation) / 2
