"""PS-ViT: a vision transformer whose tokens are sampled where the model itself wants to look.

Yue et al., "Vision Transformer with Progressive Sampling" (ICCV 2021), restated after the authors' published code; no
library has it. A convolutional stem makes a map of features; a grid of points moves over it in four steps, each token
being what the map shows at its point, plus where that is, plus what the step before said; then a class token is put in
front and plain layers follow, which are timm's ``Block``.

Shapes: B images, N points, D width, (h, w) the size of the map. Points are (y, x) in cells of the map, raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

SHRINK = 4  # pixels of an image for a cell of the map, along each side
_BY_AUTHORS = {"ps_layers": "sampling", "trans_layers": "blocks", "pos_layer": "point_embed"}
_PARTS = {"transformer_layer": "block", "offset_layer": "offset"}


def sample(features: Tensor, points: Tensor) -> Tensor:
    """(B, N, D) the map (B, D, h, w) at the points (B, N, 2), bilinear between the centres of cells.

    Beyond the map it is zero, and the last cell fades out over the width of one cell. The map has two rows and columns
    at least.
    """
    height, width = features.shape[-2:]
    y, x = points.to(features.dtype).unbind(-1)
    # grid_sample counts from -1 to 1 between the outermost centres
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1).unsqueeze(2)  # (B, N, 1, 2)
    found = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return found.squeeze(3).transpose(1, 2)


def _both(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, each with its norm, beside a shortcut; a 1x1 in the shortcut where channels differ."""

    def __init__(self, channels: int, inner: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class SamplingLayer(nn.Module):
    """One step: the layer that the tokens pass, and how far each point then moves; in the last step it stays."""

    def __init__(self, block: Block, width: int, *, moves: bool) -> None:
        super().__init__()
        self.block = block
        self.offset = nn.Linear(width, 2) if moves else None

    def forward(self, entering: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) -> the same after the layer, and how far points move (B, N, 2)."""
        tokens: Tensor = self.block(entering)
        return tokens, None if self.offset is None else self.offset(tokens)


class PSViT(nn.Module):
    """The model; ``points``: rows and columns of them.

    ``stem``: channels of the first convolution, inside the bottlenecks, and between the two of them. The layers are
    numbered through: ``samplings`` sampling layers, then those with the class token, ``depth`` in all.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        points: int | tuple[int, int] = 14,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        samplings: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem: tuple[int, int, int] = (64, 64, 256),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = _both(img_size)
        self.points = _both(points)
        if any(side % SHRINK or side < 2 * SHRINK for side in self.img_size):
            raise ValueError(
                f"img_size={img_size} must be a multiple of {SHRINK}, and {2 * SHRINK} at least: the stem makes a map "
                "that much smaller, and points lie between its cells"
            )
        if not 1 <= samplings < depth:
            raise ValueError(f"samplings={samplings} of depth={depth}: one step at least, and a layer after the last")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        first, inner, middle = stem
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, first, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            Bottleneck(first, inner, middle),
            Bottleneck(middle, inner, embed_dim),
        )
        self.point_embed = nn.Linear(2, embed_dim)
        rates = [drop_path_rate * layer / (depth - 1) for layer in range(depth)]
        layers = [
            Block(
                embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=False, drop_path=rate, norm_layer=nn.LayerNorm
            )
            for rate in rates
        ]  # fmt: skip
        self.sampling = nn.ModuleList(
            SamplingLayer(layer, embed_dim, moves=step + 1 < samplings) for step, layer in enumerate(layers[:samplings])
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.Sequential(*layers[samplings:])
        self.norm = nn.LayerNorm(embed_dim)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """As the authors: no point moves at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trunc_normal_(self.cls_token, std=0.02)
        for layer in self.sampling:
            offset: Any = layer.offset
            if offset is not None:
                nn.init.zeros_(offset.weight)

    @property
    def depth(self) -> int:
        """Layers in all, sampling ones included."""
        return len(self.sampling) + len(self.blocks)

    @property
    def heads(self) -> int:
        """Of each layer."""
        first: Any = self.blocks[0]
        return int(first.attn.num_heads)

    @property
    def map_size(self) -> tuple[int, int]:
        """Rows and columns of the map of features."""
        height, width = self.img_size
        return height // SHRINK, width // SHRINK

    def first_points(self) -> Tensor:
        """(1, N, 2) the regular grid that the points start from."""
        like = self.point_embed.weight
        axes = [
            (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) * (size / count)
            for count, size in zip(self.points, self.map_size, strict=True)
        ]
        return torch.cartesian_prod(*axes).view(1, -1, 2)

    def sampled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> tokens (B, N, D) after the sampling layers, and the points (B, N, 2) where they were
        sampled last.
        """
        if images.shape[-2:] != torch.Size(self.img_size):
            height, width = self.img_size
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} px: this PS-ViT takes {height} x {width}, for its "
                f"points lie on a map of that size"
            )
        features = self.stem(images)
        points = self.first_points().expand(images.shape[0], -1, -1)
        scale = points.new_tensor(self.map_size)
        offset: Tensor | None = None
        tokens: Tensor | None = None
        for layer in self.sampling:
            # the place is told without a gradient: a point moves for what the map shows there
            seen = sample(features, points if offset is None else points + offset)
            points = points if offset is None else points + offset.detach()
            entering = seen + self.point_embed(points / scale)
            tokens, offset = layer(entering if tokens is None else entering + tokens)
        assert tokens is not None
        return tokens, points

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, D), what the layers after the sampling read."""
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 1 + N, D) normed tokens, the class token first."""
        return self.norm(self.blocks(self.with_class_token(self.sampled(images)[0])))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of the class token."""
        return self.head(tokens[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def reset_classifier(self, num_classes: int) -> None:
        """Another head; 0: none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()


def from_authors(weights: Mapping[str, Tensor], *, num_heads: int) -> dict[str, Tensor]:
    """Weights under the authors' names -> a ``state_dict`` of ``PSViT``.

    Their released models scale logits by D**-0.5, timm's ``Attention`` by (D / heads)**-0.5: the difference, a factor
    heads**-0.5, is folded into the rows of ``qkv`` that make queries. Do not fold the weights of a model that was
    trained with the width of a head; the authors' code does that where no ``qk_scale`` is given.
    """
    found = {}
    for name, value in weights.items():
        parts = [_PARTS.get(part, part) for part in name.split(".")]
        if name == "point_coord" or "position_layer" in parts:  # the regular grid; ``pos_layer`` again
            continue
        parts[0] = _BY_AUTHORS.get(parts[0], parts[0])
        if name.endswith("attn.qkv.weight"):
            width = value.shape[0] // 3
            value = torch.cat([value[:width] * num_heads**-0.5, value[width:]])
        found[".".join(parts)] = value
    return found


def _base(points: int, **settings: Any) -> PSViT:
    return PSViT(**{"points": points, **settings})


def ps_vit_ti_14(**settings: Any) -> PSViT:
    """4.8 M parameters, 14 x 14 points; published 1.6 GFLOPs, 75.6 %."""
    return PSViT(**{"embed_dim": 192, "depth": 12, "num_heads": 3, "stem": (64, 64, 192), **settings})


def ps_vit_b_10(**settings: Any) -> PSViT:
    """21.3 M parameters, 10 x 10 points; published 3.1 GFLOPs, 80.6 %."""
    return _base(10, **settings)


def ps_vit_b_14(**settings: Any) -> PSViT:
    """14 x 14 points; published 5.4 GFLOPs, 81.7 %."""
    return _base(14, **settings)


def ps_vit_b_16(**settings: Any) -> PSViT:
    """16 x 16 points; its weights' results were not published."""
    return _base(16, **settings)


def ps_vit_b_18(**settings: Any) -> PSViT:
    """18 x 18 points; published 8.8 GFLOPs, 82.3 %."""
    return _base(18, **settings)


PRESETS = {preset.__name__: preset for preset in (ps_vit_ti_14, ps_vit_b_10, ps_vit_b_14, ps_vit_b_16, ps_vit_b_18)}
