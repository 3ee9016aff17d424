"""STViT-R: Swin whose third stage works on semantic tokens and recovers the image's (Chang et al., CVPR 2023).

Six blocks make a unit. A Swin block; two that gather a few semantic tokens in each window; two in which these attend
among themselves; one in which the image's tokens, as the first block left them, ask the semantic ones. So a unit takes
a whole map and gives one back. No library has it; the Swin blocks are timm's. Stated from the description and the
released settings, arXiv 2303.08685 and github.com/changsn/STViT-R (MIT), for images and for detection.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.checks import checked_choice
from reducers.cost import linear_macs
from reducers.errors import ReducerError

Form = Literal["classification", "detection"]

UNIT = 6
"""Blocks of a unit: Swin's, two that generate, one among the tokens of a window, one among all, the recovery."""

_THIRD = 2  # the stage of units
_INITIAL_SCALE = 1e-5  # of LayerScale


@dataclass(frozen=True)
class Semantics:
    """How a unit makes semantic tokens and what they ask; sides are counted in tokens of the map, or semantic ones."""

    side: int = 3  # s: a window is pooled to s x s tokens
    keys: int = 10  # side of the part of the map that the tokens of a window ask first
    stride: int = 4  # classification: from one such part to the next; no padding, so they cover the map exactly
    residual: bool = False  # classification: the pooled tokens remain in the sum (``shortcut``)
    centres: bool = False  # classification: a learned vector for each semantic token of the first unit (``use_global``)
    second_keys: int = 21  # detection: side of what they ask the second time
    recovery_keys: int = 27  # detection: side, in semantic tokens, of what a window asks


@dataclass(frozen=True)
class Sizes:
    """What a unit is made for."""

    width: int
    heads: int
    map_size: tuple[int, int]  # rows and columns; detection takes others
    window: int
    drop_path: tuple[float, ...]  # stochastic depth of its six blocks


class CrossAttention(nn.Module):
    """Some tokens ask others: queries apart from keys and values, with bias, without relative positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, asking: Tensor, asked: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Q, D), (B, K, D) -> (B, Q, D); mask (B, 1, 1, K) bool: which keys there are."""
        q = self.q(asking).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(asked).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        summed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(summed.transpose(1, 2).flatten(2))


class SemanticBlock(nn.Module):
    """Pre-norm attention of some tokens over others and an MLP, LayerScale on both; one norm for queries and keys."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads)
        self.ls1 = LayerScale(width, _INITIAL_SCALE)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.ls2 = LayerScale(width, _INITIAL_SCALE)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def attend(self, asking: Tensor, asked: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the attention adds: (B, Q, D), (B, K, D) -> (B, Q, D)."""
        own = self.norm1(asking)
        return self.ls1(self.attn(own, own if asked is asking else self.norm1(asked), mask))

    def join(self, x: Tensor | None, added: Tensor) -> Tensor:
        """x and what the attention adds (B, …, D), or that alone, through the MLP."""
        x = added if x is None else x + self.drop_path(added)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, asking: Tensor, asked: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention that is added to those who ask, and the MLP."""
        return self.join(asking, self.attend(asking, asked, mask))


class OnWindows(nn.Module):
    """Blocks on a map (B, H, W, D) in windows of w x w, and on semantic tokens (B, h, w, D), s x s of each window."""

    def __init__(self, window: int, semantics: Semantics, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.window, self.semantics = window, semantics
        self.blocks: Any = nn.ModuleList(blocks)
        self.centres: nn.Parameter | None = None  # (M, D), of the semantic tokens row by row

    def pool(self, x: Tensor) -> Tensor:
        """The largest of each bin of a window, s x s bins a window: (B, H, W, D) -> (B, H s / w, W s / w, D)."""
        inside = window_partition(x, (self.window, self.window)).permute(0, 3, 1, 2)
        pooled = F.adaptive_max_pool2d(inside, self.semantics.side).permute(0, 2, 3, 1)
        return self.joined(pooled.flatten(1, 2), self.semantics.side, x.shape[1:3])

    def windows(self, x: Tensor, side: int) -> Tensor:
        """A map (B, H, W, D) window by window: (B windows, side², D)."""
        return window_partition(x, (side, side)).flatten(1, 2)

    def joined(self, tokens: Tensor, side: int, of: Sequence[int]) -> Tensor:
        """The opposite, of as many windows as lie in a map of the image's tokens of size ``of``."""
        rows, columns = (extent // self.window * side for extent in of)
        return window_reverse(tokens.unflatten(1, (side, side)), (side, side), rows, columns)

    def generate(self, block: SemanticBlock, x: Tensor) -> Tensor:
        """The map pooled, and in each window asking itself and what lies around: (B, H, W, D) -> (B, h, w, D)."""
        side = self.semantics.side
        pooled = self.pool(x)
        asking = self.windows(pooled, side)
        asked = torch.cat([asking, parts(x, self.semantics.keys, self.semantics.stride)], dim=1)
        added = self.joined(block.attend(asking, asked), side, x.shape[1:3])
        return block.join(pooled if self.semantics.residual else None, added)

    def refine(self, block: SemanticBlock, semantic: Tensor, x: Tensor) -> Tensor:
        """Semantic tokens (B, h, w, D), moved by what was learned of each, ask themselves and all of the map."""
        flat = semantic.flatten(1, 2)
        moved = flat if self.centres is None else flat + self.centres
        joined: Tensor = block(moved, torch.cat([flat, x.flatten(1, 2)], dim=1))
        return joined.view(semantic.shape)

    def local(self, block: SemanticBlock, semantic: Tensor) -> Tensor:
        """Semantic tokens (B, h, w, D) among those of their window."""
        side = self.semantics.side
        inside = self.windows(semantic, side)
        of = tuple(extent // side * self.window for extent in semantic.shape[1:3])
        return block.join(semantic, self.joined(block.attend(inside, inside), side, of))

    def everywhere(self, block: SemanticBlock, semantic: Tensor) -> Tensor:
        """Semantic tokens (B, h, w, D) among all."""
        flat = semantic.flatten(1, 2)
        joined: Tensor = block(flat, flat)
        return joined.view(semantic.shape)

    def recover(self, block: SemanticBlock, semantic: Tensor, x: Tensor) -> Tensor:
        """The map (B, H, W, D) asks the semantic tokens (B, h, w, D)."""
        joined: Tensor = block(x.flatten(1, 2), semantic.flatten(1, 2))
        return joined.view(x.shape)


class Unit(OnWindows):
    """Six blocks that take a map (B, H, W, D) to another of the same shape; what forms share."""

    def __init__(self, sizes: Sizes, semantics: Semantics, *, always_partition: bool) -> None:
        swin = SwinTransformerBlock(
            sizes.width, sizes.map_size, sizes.heads, window_size=sizes.window, shift_size=0,
            always_partition=always_partition, dynamic_mask=always_partition, drop_path=sizes.drop_path[0],
        )  # fmt: skip
        others = [SemanticBlock(sizes.width, sizes.heads, rate) for rate in sizes.drop_path[1:]]
        super().__init__(sizes.window, semantics, [swin, *others])


class ImageUnit(Unit):
    """As released for classification: maps of one size, on which the parts that windows ask lie exactly.

    The semantic tokens of a window first ask themselves and a part of the map around the window, then all semantic
    tokens and all of the map; after blocks 3 and 4 all of the map asks them.
    """

    def __init__(self, sizes: Sizes, semantics: Semantics, *, first: bool) -> None:
        super().__init__(sizes, semantics, always_partition=False)
        check_covered(sizes.map_size, sizes.window, semantics)
        if semantics.centres and first:
            rows, columns = sizes.map_size
            count = rows * columns * semantics.side**2 // sizes.window**2
            self.centres = nn.Parameter(trunc_normal_(torch.empty(count, sizes.width), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        swin, generate, refine, local, everywhere, recover = self.blocks
        x = swin(x)
        semantic = self.refine(refine, self.generate(generate, x), x)
        semantic = self.everywhere(everywhere, self.local(local, semantic))
        return self.recover(recover, semantic, x)


def check_covered(map_size: tuple[int, int], window: int, semantics: Semantics) -> None:
    """Refuse windows and parts around them that do not cover a map exactly."""
    for extent in map_size:
        windows, behind = divmod(extent, window)
        if behind or semantics.keys + (windows - 1) * semantics.stride != extent:
            raise ReducerError(
                f"{windows} windows of {window} do not ask a side of {extent} tokens exactly by parts of "
                f"{semantics.keys} every {semantics.stride}; change the image size, window, keys or stride, or "
                "take form='detection', which pads"
            )


class PaddedUnit(Unit):
    """As released for detection: maps of any size, padded to whole windows, and each window asks what lies around it.

    No pooled tokens among the keys, and they remain in the sum. Keys outside of the image are masked; which those are
    is told by their places (the released code masks all of them where nothing was padded, and so none). A semantic
    token is outside where its bin begins outside. Blocks 3 and 4 mask nothing, as released.
    """

    def __init__(self, sizes: Sizes, semantics: Semantics) -> None:
        super().__init__(sizes, semantics, always_partition=True)

    def forward(self, x: Tensor) -> Tensor:
        _, generate, refine, local, everywhere, recover = self.blocks
        semantics, side, window = self.semantics, self.semantics.side, self.window
        x = self.blocks[0](x)
        images, rows, columns, _ = x.shape
        padded = F.pad(x, (0, 0, 0, -columns % window, 0, -rows % window))
        there = tuple(torch.arange(extent + -extent % window, device=x.device) < extent for extent in (rows, columns))

        semantic = self.pool(padded)
        for block, keys in ((generate, semantics.keys), (refine, semantics.second_keys)):
            asked, mask = around(padded, keys, window), _mask(there, keys, window, images)
            added = block.attend(self.windows(semantic, side), asked, mask)
            semantic = block.join(semantic, self.joined(added, side, padded.shape[1:3]))
        semantic = self.everywhere(everywhere, self.local(local, semantic))

        keys = semantics.recovery_keys
        begun = tuple(self._bins(extent, x.device) < extent for extent in (rows, columns))
        asked, mask = around(semantic, keys, side), _mask(begun, keys, side, images)
        added = self.joined(recover.attend(self.windows(padded, window), asked, mask), window, padded.shape[1:3])
        return recover.join(x, added[:, :rows, :columns])

    def _bins(self, extent: int, device: torch.device) -> Tensor:
        """Where the bins of the semantic tokens along a side of ``extent`` tokens begin, among those."""
        inside = torch.arange(self.semantics.side, device=device) * self.window // self.semantics.side
        return (torch.arange(0, extent, self.window, device=device)[:, None] + inside).flatten()


def parts(x: Tensor, side: int, stride: int) -> Tensor:
    """Squares of a map (B, H, W, D), row by row: (B squares, side², D)."""
    cut = x.unfold(1, side, stride).unfold(2, side, stride)  # (B, rows, columns, D, side, side)
    return cut.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)


def around(x: Tensor, side: int, window: int) -> Tensor:
    """The square around each window of a map (B, H, W, D), with zeros outside of it: (B windows, side², D)."""
    before = (side - window) // 2
    behind = side - window - before
    return parts(F.pad(x, (0, 0, before, behind, before, behind)), side, window)


def _mask(there: tuple[Tensor, ...], side: int, window: int, images: int) -> Tensor:
    """Which of the keys that ``around`` gives are in the image, (B windows, 1, 1, side²) bool; rows and columns."""
    rows, columns = there
    inside = (rows[:, None] & columns).float()[None, :, :, None]
    return (around(inside, side, window) > 0).transpose(1, 2)[:, None].repeat(images, 1, 1, 1)


class UnitStage(nn.Module):
    """Patch merging and units, in the place of a stage of Swin blocks."""

    def __init__(self, merged: int, units: list[Unit], width: int) -> None:
        super().__init__()
        self.downsample = PatchMerging(merged, width)
        self.units = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.downsample(x))


class Stem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with batch norm and hard swish: (B, C, H, W) -> (B, H / 4, W / 4, D).

    With ``patch`` 2 the second has stride 1, for small images [D].
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=patch // 2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        x = F.hardswish(self.norm1(self.conv1(images)))
        return F.hardswish(self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class OnMaps(nn.Module):
    """A stem and stages on maps, and a head that reads the mean of the last one; for images of one size."""

    stem: nn.Module  # (B, C, H, W) -> (B, H', W', D)
    layers: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Module

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        self.image_size, self.channels, self.classes = image_size, channels, classes

    def forward(self, images: Tensor) -> Any:
        """images (B, C, H, W) -> logits (B, classes)."""
        return self.head(self.features(images).flatten(1, 2).mean(1))

    def features(self, images: Tensor) -> Tensor:
        """The last map, (B, H, W, D), final norm included."""
        height, width = images.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ReducerError(
                f"images of {height} x {width} and a model for {self.image_size} x {self.image_size}; make it with "
                "image_size=…" + (", or form='detection'" if isinstance(self, STViTRSwin) else "")
            )
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.norm(x)
        return found

    def reset_classifier(self, classes: int) -> None:
        """Another head of so many classes; 0: none, and ``forward`` gives what it would read."""
        weight = self.norm.weight
        self.head = nn.Linear(weight.numel(), classes).to(weight) if classes else nn.Identity()
        self.classes = classes

    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-adds of one image of height and width ``size``: linear layers, convolutions, attention products."""
        shape = (self.image_size, self.image_size) if size is None else size
        pairs = 0

        def count(module: nn.Module, given: tuple[Any, ...], _: Tensor) -> None:
            nonlocal pairs
            asking, asked = given[0], given[1] if isinstance(module, CrossAttention) else given[0]
            pairs += asking.numel() * asked.shape[1]

        twin = copy.deepcopy(self).to("meta")
        for module in twin.modules():
            if isinstance(module, (CrossAttention, WindowAttention)):
                module.register_forward_hook(count)
        image = torch.zeros(1, self.channels, *shape, device="meta", dtype=next(self.parameters()).dtype)
        return linear_macs(twin, image) + 2 * pairs  # whose one run calls the hooks as well


class STViTRSwin(OnMaps):
    """Swin with a stem of convolutions and units of six blocks in its third stage.

    ``form="classification"`` gives logits (B, classes) of images of the size it was made for; ``"detection"`` takes
    images of any size and gives the normed map of each stage, (B, D, H, W). Widths double from stage to stage. The
    released models are ``stvit_r_swin_small`` and ``stvit_r_swin_base``.

    Raises:
        ReducerError: the third stage is no whole number of units, the windows and the parts they ask do not cover its
            map, or at a call the images have another size.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch: int = 4,
        channels: int = 3,
        classes: int = 1000,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        semantics: Semantics | None = None,
        form: Form = "classification",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(image_size, channels, classes)
        self.form = checked_choice(form, Form, "STViTRSwin(form=…)")
        detection = form == "detection"
        if semantics is None:
            semantics = Semantics(keys=14) if detection else Semantics()
        if patch not in (2, 4) or len(depths) != len(heads) or len(depths) <= _THIRD:
            raise ReducerError(
                f"a patch of 2 or 4 pixels, three stages or more, and heads for each of them; got patch={patch}, "
                f"depths={depths}, heads={heads}"
            )
        if depths[_THIRD] % UNIT:
            raise ReducerError(f"the third stage is made of units of {UNIT} blocks; got depths={depths}")
        self.stem = Stem(channels, width, patch)
        rates = [drop_path * index / max(sum(depths) - 1, 1) for index in range(sum(depths))]
        self.layers = nn.ModuleList()
        side, first = image_size // patch, 0
        for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
            own = rates[first : first + depth]
            sides = (side, side) if stage == 0 else ((side + 1) // 2, (side + 1) // 2)
            if stage == _THIRD:
                made = [
                    _unit(
                        Sizes(width, head, sides, window, tuple(own[at : at + UNIT])),
                        semantics, detection=detection, first=at == 0,
                    )
                    for at in range(0, depth, UNIT)
                ]  # fmt: skip
                self.layers.append(UnitStage(width // 2, made, width))
            else:
                self.layers.append(
                    SwinTransformerStage(
                        width if stage == 0 else width // 2, width, (side, side), depth, stage > 0, head,
                        window_size=window, always_partition=detection, dynamic_mask=detection, drop_path=own,
                    )
                )  # fmt: skip
            if detection:
                self.add_module(f"norm{stage}", nn.LayerNorm(width))
            side, first, width = sides[0], first + depth, 2 * width
        if not detection:
            self.norm = nn.LayerNorm(width // 2)
            self.head = nn.Linear(width // 2, classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Any:
        """images (B, C, H, W) -> logits (B, classes), or the maps of the stages (B, D, H, W)."""
        return self.maps(images) if self.form == "detection" else super().forward(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps that a detector reads, normed, of each stage: (B, D, H, W)."""
        found, x = [], self.stem(images)
        for stage, layer in enumerate(self.layers):
            x = layer(x)
            found.append(self.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2))
        return found


def _unit(sizes: Sizes, semantics: Semantics, *, detection: bool, first: bool) -> Unit:
    return PaddedUnit(sizes, semantics) if detection else ImageUnit(sizes, semantics, first=first)


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stvit_r_swin_small(**changes: Any) -> STViTRSwin:
    """The released STViT-R-Swin-S: 49,625,518 parameters, 5.7987 G multiply-adds at 224 x 224."""
    return STViTRSwin(**changes)


def stvit_r_swin_base(**changes: Any) -> STViTRSwin:
    """The released STViT-R-Swin-B: 87,812,336 parameters, 10.2274 G multiply-adds at 224 x 224."""
    return STViTRSwin(**{"width": 128, "heads": (4, 8, 16, 32), **changes})


PRESETS = {"stvit_r_swin_small": stvit_r_swin_small, "stvit_r_swin_base": stvit_r_swin_base}


def stvit_r_swin_toy(**changes: Any) -> STViTRSwin:
    """One unit on images of 64 x 64: maps of 32², 16² and 8², 2 x 2 semantic tokens in each of 2 x 2 windows [D]."""
    toy: dict[str, Any] = {
        "image_size": 64, "patch": 2, "channels": 1, "classes": 10, "width": 24, "depths": (2, 2, 6),
        "heads": (1, 2, 4), "window": 4, "semantics": Semantics(side=2, keys=6, stride=2),
    }  # fmt: skip
    return STViTRSwin(**{**toy, **changes})


# --- the authors' checkpoints -----------------------------------------------------------------------------------------

_MADE_ANEW = re.compile(r".*\.(relative_position_index|attn_mask)")  # follow from sizes
_STEM = {"0.c": "conv1", "0.bn": "norm1", "2.c": "conv2", "2.bn": "norm2"}
_IN_BLOCKS = r"(?:norm[12]|attn\.(?:qkv|q|kv|proj)|mlp\.fc[12])\.(?:weight|bias)|attn\.relative_position_bias_table"


def from_release(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an authors' checkpoint by the names of ``STViTRSwin``, for ``load_state_dict``.

    Takes both releases: the classifiers', and of the detectors' what begins with ``backbone.``. Patch merging ends a
    stage there and begins one here; buffers that follow from sizes are left out.

    Raises:
        ReducerError: a name that the released models do not have.
    """
    inner = {name.removeprefix("backbone."): each for name, each in weights.items() if name.startswith("backbone.")}
    found: dict[str, Tensor] = {}
    for name, each in (inner or weights).items():
        if _MADE_ANEW.fullmatch(name):
            continue
        ours = _renamed(name)
        if ours is None:
            raise ReducerError(f"{name} is no weight of a released STViT-R; its stages are of Swin, the third of units")
        found[ours] = each.squeeze(0) if ours.endswith(".centres") else each
    return found


def _renamed(name: str) -> str | None:
    """Our name of one of the authors' weights; None where they have none of that name."""
    if stem := re.fullmatch(r"patch_embed\.proj\.([02]\.(?:c|bn))\.(\w+)", name):
        return f"stem.{_STEM[stem[1]]}.{stem[2]}"
    if merging := re.fullmatch(r"layers\.(\d)\.downsample\.((?:norm|reduction)\.\w+)", name):
        return f"layers.{int(merging[1]) + 1}.downsample.{merging[2]}"
    if re.fullmatch(r"(norm\d?|head)\.(weight|bias)", name):
        return name
    if name == f"layers.{_THIRD}.semantic_token2":
        return f"layers.{_THIRD}.units.0.centres"
    block = re.fullmatch(rf"layers\.(\d)\.blocks\.(\d+)\.({_IN_BLOCKS}|layer_scale_([12]))", name)
    if block is None:
        return None
    rest = f"ls{block[4]}.gamma" if block[4] else block[3]
    if int(block[1]) != _THIRD:
        return f"layers.{block[1]}.blocks.{block[2]}.{rest}"
    unit, inside = divmod(int(block[2]), UNIT)
    return f"layers.{_THIRD}.units.{unit}.blocks.{inside}.{rest}"
