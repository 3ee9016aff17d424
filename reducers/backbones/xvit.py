"""X-ViT: a vision transformer for each frame of a clip, whose keys and values come in part from the frames beside it.

Bulat et al., "Space-time Mixing Attention for Video Transformer" (NeurIPS 2021), restated after the authors' published
code; no library has it. In every block keys and values are shifted in time: an eighth of their channels is that of the
frame behind, another that of the frame before. So attention over space sees three frames at the price of one, and 2 k
blocks deep a frame has heard of those k away. A small transformer over the frames' class tokens ends in logits.

Shapes: B clips, F frames, N patches of a frame, D width. Frames are rows of a batch, clip by clip: (B F, 1 + N, D).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, trunc_normal_
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

SHARE = 8  # one in so many channels comes from the frame behind, and as many from the frame before


def shift_in_time(x: Tensor, group: int) -> Tensor:
    """Rows of frames (B F, ..., C) -> the same with channels of their neighbours in groups of ``group`` frames.

    The first eighth of the channels is that of the next frame, the second eighth that of the frame before; beyond the
    ends of a group they are zero. A frame that is a group of its own keeps its channels: it has no neighbours to hear.
    """
    if group == 1:
        return x
    share = x.shape[-1] // SHARE
    frames = x.view(x.shape[0] // group, group, *x.shape[1:])
    behind, before, rest = frames.split([share, share, x.shape[-1] - 2 * share], dim=-1)
    nothing = torch.zeros_like(behind[:, :1])
    behind = torch.cat([behind[:, 1:], nothing], dim=1)
    before = torch.cat([nothing, before[:, :-1]], dim=1)
    return torch.cat([behind, before, rest], dim=-1).flatten(0, 1)


class ShiftedAttention(Attention):
    """timm's ``Attention`` of each frame, over keys and values shifted in time.

    Channels count through the heads: channel = head * (width of a head) + its own number. With heads of 64 of 768 the
    shifted eighths are one head and a half each.
    """

    group = 1  # frames that exchange; the model sets it

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Frames (B F, 1 + N, D) -> (B F, 1 + N, D)."""
        assert attn_mask is None and not is_causal
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        key, value = shift_in_time(key, self.group), shift_in_time(value, self.group)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        added: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return added


class ClipHead(nn.Module):
    """The frames' class features (B, F, D) -> logits (B, classes): a class token of the clip's own before them, one
    block without positions, and of that token's output two linear layers.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int, *, mlp_ratio: float = 4.0, drop_rate: float = 0.5):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.block = Block(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=False, norm_layer=nn.LayerNorm)
        self.norm = nn.LayerNorm(width)
        self.pre_logits = nn.Linear(width, width)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def pooled(self, features: Tensor) -> Tensor:
        """(B, F, D) -> (B, D), what the last linear layer reads."""
        tokens = torch.cat([self.cls_token.expand(features.shape[0], -1, -1), features], dim=1)
        read: Tensor = self.norm(self.block(tokens))[:, 0]
        pooled: Tensor = self.drop(self.act(self.pre_logits(read)))
        return pooled

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pooled(features))
        return logits


class XViT(VisionTransformer):
    """timm's ``VisionTransformer`` for each frame, with shifted keys and values, a time embedding and ``ClipHead``.

    A ``VisionTransformer``'s weights are those of the frames: only ``time_embed`` and ``head`` are new. ``group``: how
    many frames in a row exchange keys and values and have time embeddings of their own; None: all ``num_frames``. As
    released, 16 frames are two groups of 8 that meet in the head alone.
    """

    def __init__(
        self,
        *,
        num_frames: int = 8,
        group: int | None = None,
        num_classes: int = 400,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.5,
        **settings: Any,
    ) -> None:
        """``settings``: of ``VisionTransformer``, ``img_size``, ``patch_size``, ``in_chans``, ``depth``,
        ``drop_path_rate``, ….

        Raises:
            ValueError: the clip is no whole number of groups, or the width has no eighths.
        """
        group = num_frames if group is None else group
        if group < 1 or num_frames % group:
            raise ValueError(f"group={group}: a clip of {num_frames} frames is no whole number of such groups")
        if embed_dim % SHARE:
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of {SHARE}: eighths of the channels are shifted"
            )
        super().__init__(
            num_classes=0, embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio,
            **{**settings, "attn_layer": ShiftedAttention},
        )  # fmt: skip
        self.num_frames = num_frames
        self.group = group
        self.num_classes = num_classes
        for block in self.blocks:
            block.attn.group = group  # type: ignore[union-attr]
        self.time_embed = nn.Parameter(torch.zeros(1, group, 1, embed_dim))
        self.head: Any = ClipHead(embed_dim, num_heads, num_classes, mlp_ratio=mlp_ratio, drop_rate=drop_rate)
        self._initialise()

    def _initialise(self) -> None:
        """Of what is new; the frames' own part is initialised by timm."""
        trunc_normal_(self.time_embed, std=0.02)
        trunc_normal_(self.head.cls_token, std=0.02)
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def tokens(self, clips: Tensor) -> Tensor:
        """Clips (B, F, C, H, W) -> the tokens that enter block 0, (B F, 1 + N, D).

        Raises:
            ValueError: these are no clips of ``num_frames`` frames.
        """
        if clips.dim() != 5 or clips.shape[1] != self.num_frames:
            raise ValueError(
                f"clips of shape {tuple(clips.shape)}: this XViT takes (B, {self.num_frames}, C, H, W), "
                f"{self.num_frames} frames of a clip"
            )
        x = self._pos_embed(self.patch_embed(clips.flatten(0, 1)))
        by_group = x.view(x.shape[0] // self.group, self.group, *x.shape[1:])
        entering: Tensor = self.norm_pre((by_group + self.time_embed).flatten(0, 1))
        return entering

    def forward_features(self, clips: Tensor) -> Tensor:  # type: ignore[override]  # frames know no masks
        """(B, F, 1 + N, D) normed tokens, each frame's class token first."""
        x = self.tokens(clips)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        normed: Tensor = self.norm(x)
        return normed.view(len(clips), self.num_frames, *x.shape[1:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of ``forward_features`` -> logits (B, classes), or what the last linear layer reads (B, D)."""
        features = x[:, :, 0]
        found: Tensor = self.head.pooled(features) if pre_logits else self.head(features)
        return found

    def forward(self, clips: Tensor) -> Tensor:  # type: ignore[override]  # as above
        """Clips (B, F, C, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(clips))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another last layer; 0: none."""
        self.num_classes = num_classes
        self.head.fc = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()


def xvit_b_8(**settings: Any) -> XViT:
    """ViT-B/16 on 8 frames; three views of it are published as 425 GFLOPs."""
    return XViT(**settings)


def xvit_b_16(**settings: Any) -> XViT:
    """ViT-B/16 on 16 frames in two groups of 8; three views of it are published as 850 GFLOPs."""
    return XViT(**{"num_frames": 16, "group": 8, **settings})


PRESETS = {preset.__name__: preset for preset in (xvit_b_8, xvit_b_16)}
