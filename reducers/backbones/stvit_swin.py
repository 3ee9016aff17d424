"""STViT on Swin: semantic tokens take the place of the image's in the third stage (Chang et al., CVPR 2023).

``base`` Swin blocks on the whole map; two that gather s x s semantic tokens in each window, as in STViT-R
(``reducers.backbones.stvit_r``); and from there on semantic tokens alone, in turn among those of a window and among
all. Patch merging joins 2 x 2 of them, and the last stage works on what is left. No code of it was released, and how
many base blocks the published models have is in no public source: so ``base`` has no default here, and every number
says it. arXiv 2303.08685; what it leaves open is ours [D].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from timm.layers.format import Format
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from torch import Tensor, nn

from reducers.backbones.stvit_r import OnMaps, OnWindows, SemanticBlock, Semantics, check_covered, initialise
from reducers.errors import ReducerError

Step = Literal["swin", "generate", "refine", "local", "everywhere", "recover"]

_THIRD = 2  # the stage in which semantic tokens are made
_ALL: Step = "everywhere"


def semantics_of(map_side: int, window: int, side: int = 4) -> Semantics:
    """s x s tokens a window, and parts around windows that cover the map as the released ones do: of 14 tokens in two
    windows of 7 there are parts of 10 every 4, of 8 in two of 4 parts of 6 every 2.
    """
    stride = (window + 1) // 2
    return Semantics(side=side, keys=map_side - (map_side // window - 1) * stride, stride=stride)


class SemanticStage(OnWindows):
    """Patch merging and blocks, of which some are on semantic tokens: each does its step."""

    def __init__(
        self,
        merged: int,
        width: int,
        map_size: tuple[int, int],
        window: int,
        semantics: Semantics,
        blocks: list[nn.Module],
        steps: tuple[Step, ...],
    ) -> None:
        super().__init__(window, semantics, blocks)
        self.downsample = PatchMerging(merged, width)
        self.map_size, self.steps = map_size, steps  # of what enters its first block

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the map of semantic tokens, (B, h, w, 2 D)."""
        x = image = self.downsample(x)
        for block, step in zip(self.blocks, self.steps, strict=True):
            if step == "swin":
                x = image = block(x)
            elif step == "generate":
                x = self.generate(block, image)
            elif step == "refine":
                x = self.refine(block, x, image)
            else:
                x = (self.local if step == "local" else self.everywhere)(block, x)
        return x


class STViTSwin(OnMaps):
    """Swin of which the third stage ends and the last one works on semantic tokens, s x s of each window.

    ``from_swin`` makes one with the weights of a Swin of timm's. ``base``: Swin blocks before the generation; it and
    two generating blocks come out of ``depths[2]``, and what is left works on semantic tokens: in a block of odd index
    those of a window, in one of even index all. In later stages all attend to all. Semantic blocks are those of the
    released STViT-R: no relative positions, LayerScale from 1e-5 on.

    Raises:
        ReducerError: there are no blocks left for the generation, the windows and the parts they ask do not cover the
            map, or at a call the images have another size.
    """

    def __init__(
        self,
        *,
        base: int,
        image_size: int = 224,
        patch: int = 4,
        channels: int = 3,
        classes: int = 1000,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        semantics: Semantics | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(image_size, channels, classes)
        if len(depths) != len(heads) or len(depths) <= _THIRD:
            raise ReducerError(f"three stages or more, and heads for each of them; got depths={depths}, heads={heads}")
        if not 1 <= base <= depths[_THIRD] - 2:
            raise ReducerError(
                f"base={base} of {depths[_THIRD]} blocks: one base block or more, and two blocks behind them that "
                "generate"
            )
        self.base = base
        self.stem = PatchEmbed(
            image_size, patch, channels, width, norm_layer=nn.LayerNorm, output_fmt=Format.NHWC.value
        )
        rates = [drop_path * index / max(sum(depths) - 1, 1) for index in range(sum(depths))]
        self.layers = nn.ModuleList()
        before, first = image_size // patch, 0  # the side of the map that enters a stage
        for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
            own, merged = rates[first : first + depth], width if stage == 0 else width // 2
            side = before if stage == 0 else (before + 1) // 2
            if stage < _THIRD:
                made: nn.Module = SwinTransformerStage(
                    merged, width, (before, before), depth, stage > 0, head, window_size=window, drop_path=own
                )
            else:
                if stage == _THIRD:
                    semantics = semantics or semantics_of(side, window)
                    check_covered((side, side), window, semantics)
                assert semantics is not None
                steps = steps_of(depth, base) if stage == _THIRD else (_ALL,) * depth
                blocks = [
                    _swin(width, side, head, window, rate, index) if step == "swin"
                    else SemanticBlock(width, head, rate)
                    for index, (step, rate) in enumerate(zip(steps, own, strict=True))
                ]  # fmt: skip
                made = SemanticStage(merged, width, (side, side), window, semantics, blocks, steps)
                if stage == _THIRD:
                    side = side // window * semantics.side
            self.layers.append(made)
            before, first, width = side, first + depth, 2 * width
        self.norm = nn.LayerNorm(width // 2)
        self.head = nn.Linear(width // 2, classes)
        self.apply(initialise)

    @classmethod
    def from_swin(cls, swin: SwinTransformer, *, base: int, semantics: Semantics | None = None) -> STViTSwin:
        """With copies of the weights of a Swin, as ``stvit`` uses a ViT's own: blocks on semantic tokens have those of
        the block in their place, without its relative positions and with LayerScale 1, and the pooled tokens remain in
        the sum [D].

        Raises:
            ReducerError: as the class does, and a Swin whose parts this model has not (oblong, of other MLPs or heads).
        """
        layers: Any = swin.layers
        stages: list[Any] = list(layers)
        if len(stages) <= _THIRD:
            raise ReducerError(f"three stages or more are needed, and this Swin has {len(stages)}")
        head: Any = swin.head.fc
        embed: Any = swin.patch_embed
        blocks = [stage.blocks[0] for stage in stages]
        (height, wide), window = embed.img_size, blocks[0].window_size
        plain = height == wide and window[0] == window[1] and embed.norm is not None
        if not plain or any(
            block.mlp.fc1.out_features != 4 * block.dim or block.attn.qkv.bias is None for block in blocks
        ):
            raise ReducerError(
                "STViTSwin is made of a square Swin with square windows, an MLP of four times its width and biases of "
                "queries, keys and values; take one of timm's as they are registered"
            )
        if semantics is None:
            semantics = semantics_of(blocks[_THIRD].input_resolution[0], window[0])
        model = cls(
            base=base,
            image_size=int(height),
            patch=int(embed.proj.weight.shape[-1]),
            channels=int(embed.proj.in_channels),
            classes=int(swin.num_classes),
            width=int(blocks[0].dim),
            depths=tuple(len(stage.blocks) for stage in stages),
            heads=tuple(int(block.attn.num_heads) for block in blocks),
            window=int(window[0]),
            semantics=replace(semantics, residual=True),
        )
        model.stem.load_state_dict(embed.state_dict())
        model.norm.load_state_dict(swin.norm.state_dict())
        model.head.load_state_dict(head.state_dict())
        for own, stage in zip(model.layers, stages, strict=True):
            if not isinstance(own, SemanticStage):
                own.load_state_dict(stage.state_dict())
                continue
            own.downsample.load_state_dict(stage.downsample.state_dict())
            for block, theirs in zip(own.blocks, stage.blocks, strict=True):
                weights = theirs.state_dict()
                block.load_state_dict(semantic_weights(weights) if isinstance(block, SemanticBlock) else weights)
        return model


def steps_of(depth: int, base: int) -> tuple[Step, ...]:
    """What each block of the third stage does."""
    whole: list[Step] = ["swin"] * base
    behind: list[Step] = ["local" if index % 2 else _ALL for index in range(base + 2, depth)]
    return (*whole, "generate", "refine", *behind)


def semantic_weights(swin: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Swin block by the names of a ``SemanticBlock``, LayerScale 1."""
    found = {name: each for name, each in swin.items() if name.startswith(("norm", "mlp", "attn.proj"))}
    for kind in ("weight", "bias"):
        qkv = swin[f"attn.qkv.{kind}"]
        width = len(qkv) // 3
        found[f"attn.q.{kind}"], found[f"attn.kv.{kind}"] = qkv[:width], qkv[width:]
    ones = torch.ones_like(swin["norm1.weight"])
    return {**found, "ls1.gamma": ones, "ls2.gamma": ones}


def _swin(width: int, side: int, heads: int, window: int, rate: float, index: int) -> nn.Module:
    shift = window // 2 if index % 2 and side > window else 0
    return SwinTransformerBlock(width, (side, side), heads, window_size=window, shift_size=shift, drop_path=rate)


def stvit_swin_tiny(*, base: int, **changes: Any) -> STViTSwin:
    """The shapes of Swin-T with so many base blocks."""
    return STViTSwin(base=base, **changes)


def stvit_swin_small(*, base: int, **changes: Any) -> STViTSwin:
    """The shapes of Swin-S with so many base blocks."""
    return STViTSwin(base=base, **{"depths": (2, 2, 18, 2), **changes})


def stvit_swin_base(*, base: int, **changes: Any) -> STViTSwin:
    """The shapes of Swin-B with so many base blocks."""
    return STViTSwin(base=base, **{"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), **changes})


PRESETS = {
    "stvit_swin_tiny": stvit_swin_tiny, "stvit_swin_small": stvit_swin_small, "stvit_swin_base": stvit_swin_base,
}  # fmt: skip
