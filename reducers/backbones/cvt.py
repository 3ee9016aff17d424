"""CvT (Wu et al., ICCV 2021, arXiv 2103.15808) with the arithmetic and the names of parameters that its authors have.

transformers has a CvT too, which is another function of the same weights: GELU in place of QuickGELU, and stochastic
depth that drops the whole image instead of a branch. Weights that the authors trained belong here:
``model.load_state_dict(torch.load(file, weights_only=True))``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x)"""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Queries of all tokens over keys and values of a grid of half the side; the class token takes part unconvolved.

    ``kernel``, ``padding`` and ``stride`` are those of the depthwise convolutions; the query's has stride 1. Logits are
    scaled by the whole width's root, not the head's.
    """

    def __init__(
        self, width: int, heads: int, *, has_class_token: bool, kernel: int = 3, padding: int = 1, stride: int = 2
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.has_class_token = heads, width**-0.5, has_class_token

        def convolution(step: int) -> nn.Sequential:
            conv = nn.Conv2d(width, width, kernel, step, padding, bias=False, groups=width)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width)))

        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (convolution(step) for step in (1, stride, stride))
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """x (B, N, D) with ``rows`` x ``columns`` patches behind the class token, if there is one: (B, N, D)."""
        lead = x[:, : int(self.has_class_token)]
        grid = x[:, int(self.has_class_token) :].transpose(1, 2).unflatten(2, (rows, columns))
        q, k, v = (
            linear(torch.cat([lead, convolution(grid).flatten(2).transpose(1, 2)], dim=1))
            .unflatten(2, (self.heads, -1))
            .transpose(1, 2)
            for convolution, linear in (
                (self.conv_proj_q, self.proj_q),
                (self.conv_proj_k, self.proj_k),
                (self.conv_proj_v, self.proj_v),
            )
        )
        summed = (q @ k.transpose(2, 3) * self.scale).softmax(dim=3) @ v  # (B, H, N, d)
        found: Tensor = self.proj(summed.transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """``x + path(attn(norm1 x)); x + path(mlp(norm2 x))``"""

    def __init__(self, width: int, heads: int, *, has_class_token: bool, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, has_class_token=has_class_token)
        hidden = int(width * mlp_ratio)
        layers = OrderedDict(fc1=nn.Linear(width, hidden), act=QuickGELU(), fc2=nn.Linear(hidden, width))
        self.mlp = nn.Sequential(layers)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), rows, columns))
        found: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return found


class Embedding(nn.Module):
    """A convolution whose windows overlap, and a norm: (B, C, H, W) -> (B, D, rows, columns)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel, stride, padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        found: Tensor = self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return found


class Stage(nn.Module):
    """An embedding and the blocks on its grid."""

    def __init__(
        self, embedding: Embedding, width: int, heads: int, rates: Sequence[float], *, has_class_token: bool,
        mlp_ratio: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = embedding
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_class_token else None
        self.blocks = nn.ModuleList(
            Block(width, heads, has_class_token=has_class_token, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the map (B, D, rows, columns) and the class token (B, 1 or 0, D)."""
        grid = self.patch_embed(x)
        rows, columns = grid.shape[2:]
        x = grid.flatten(2).transpose(1, 2)
        lead = 0
        if self.cls_token is not None:
            x, lead = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1), 1
        for block in self.blocks:
            x = block(x, rows, columns)
        return x[:, lead:].transpose(1, 2).unflatten(2, (rows, columns)), x[:, :lead]


class CvT(nn.Module):
    """Three stages on grids of a quarter, an eighth and a sixteenth of the image; the class token joins in the last.

    There is no position embedding, so images of any size are taken; ``img_size`` is the one that costs are told for.
    ``drop_path``: of the last block of the last stage; the rate rises linearly within that stage, from 0.
    """

    def __init__(
        self,
        depth: Sequence[int] = (1, 2, 10),
        *,
        width: Sequence[int] = (64, 192, 384),
        heads: Sequence[int] = (1, 3, 6),
        kernel: Sequence[int] = (7, 3, 3),
        stride: Sequence[int] = (4, 2, 2),
        padding: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 4.0,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.image_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        last = len(depth) - 1
        for index, blocks in enumerate(depth):
            taken = in_chans if index == 0 else width[index - 1]
            embedding = Embedding(taken, width[index], kernel[index], stride[index], padding[index])
            rate = drop_path if index == last else 0.0
            rates = [rate * block / max(blocks - 1, 1) for block in range(blocks)]
            stage = Stage(
                embedding, width[index], heads[index], rates, has_class_token=index == last, mlp_ratio=mlp_ratio
            )
            setattr(self, f"stage{index}", stage)
        self.norm = nn.LayerNorm(width[last])
        self.head = nn.Linear(width[last], num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """First to last."""
        return tuple(module for name, module in self.named_children() if name.startswith("stage"))  # type: ignore[misc]

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        lead = x = images
        for stage in self.stages:
            x, lead = stage(x)
        found: Tensor = self.head(self.norm(lead[:, 0]))
        return found


def _initialise(module: nn.Module) -> None:
    """As the authors begin: truncated normal weights of standard deviation 0.02, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    if isinstance(module, Stage) and module.cls_token is not None:
        nn.init.trunc_normal_(module.cls_token, std=0.02)


def cvt_13(img_size: int | tuple[int, int] = 224, num_classes: int = 1000, drop_path: float = 0.1) -> CvT:
    """CvT-13: 19.997 M parameters; 4.566 G multiply-adds at 224, 16.269 G at 384."""
    return CvT((1, 2, 10), img_size=img_size, num_classes=num_classes, drop_path=drop_path)


def cvt_21(img_size: int | tuple[int, int] = 224, num_classes: int = 1000, drop_path: float = 0.1) -> CvT:
    """CvT-21: 31.623 M parameters; 7.178 G multiply-adds at 224, 24.849 G at 384."""
    return CvT((1, 4, 16), img_size=img_size, num_classes=num_classes, drop_path=drop_path)
