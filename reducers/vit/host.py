"""What comes before the blocks: how images enter the model, and what a reducer may ask of it to plan ahead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.layers.format import Format
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.reducer import State, TokenReducer
from reducers.signals import Signals
from reducers.tokens import TokenBatch
from reducers.trace import Tracer
from reducers.vit.block import run_block
from reducers.vit.cross import cross_block

Grid = tuple[int, int]


def grid_of(base: VisionTransformer, images: Tensor | None = None) -> Grid:
    """Rows and columns of patches: of these images, or of those the model was made for."""
    embed = base.patch_embed
    if images is None and embed.grid_size is not None:
        return int(embed.grid_size[0]), int(embed.grid_size[1])
    if images is None:
        raise ReducerError("the model has no image size of its own; create it with img_size=…")
    rows, columns = embed.dynamic_feat_size(images.shape[-2:])
    return int(rows), int(columns)


def whole_patches(base: VisionTransformer, images: Tensor) -> tuple[Grid, Grid]:
    """Rows and columns of patches of images that are to be resized, and the pixels of a patch; images that the model
    does not take are refused.
    """
    height, width = int(images.shape[-2]), int(images.shape[-1])
    embed = base.patch_embed
    down, across = embed.feat_ratio(as_scalar=False)
    if not base.dynamic_img_size and (height, width) != tuple(embed.img_size):
        raise ReducerError(
            f"the images have {height} x {width} px and the model was made for {embed.img_size[0]} x "
            f"{embed.img_size[1]}; resize them, or create the model with dynamic_img_size=True"
        )
    if base.dynamic_img_size and not embed.dynamic_img_pad and (height % down or width % across):
        raise ReducerError(
            f"images of {height} x {width} px are no whole patches of {down} x {across}; resize them, or create the "
            "model with dynamic_img_pad=True"
        )
    return grid_of(base, images), (int(down), int(across))


def entrance(base: VisionTransformer, *, resized: bool) -> VisionTransformer:
    """The model to embed images with: itself, or for resized ones a twin that shares every weight and interpolates
    positions.
    """
    if not resized or base.dynamic_img_size:
        return base
    if type(base.patch_embed) is not PatchEmbed:
        raise ReducerError(
            f"images cannot be resized for a model whose patches come from {type(base.patch_embed).__name__}; "
            "create the model with dynamic_img_size=True"
        )
    twin, patches = copy.copy(base), copy.copy(base.patch_embed)
    patches.strict_img_size, patches.flatten, patches.output_fmt = False, False, Format.NHWC
    twin._modules = {**base._modules, "patch_embed": patches}
    twin.__dict__["dynamic_img_size"] = True  # of the twin alone; timm declares it final
    return twin


def embed(base: VisionTransformer, images: Tensor) -> Tensor:
    """Images -> the tokens that enter block 0, (B, N, D)."""
    if base.dynamic_img_size and images.shape[0] == 0:  # timm cannot tell how many positions to interpolate for
        return embed(base, images.new_zeros(1, *images.shape[1:]))[:0]
    return base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))


def carriers(original: Grid, run: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between two grids over one image: the patch of the grid as run that covers each original one's centre (N0,),
    and the original patch at the centre of each one as run (N,).
    """

    def centres(of: Grid, among: Grid) -> Tensor:
        rows, columns = (
            ((torch.arange(n, device=device) * 2 + 1) * m).div(2 * n, rounding_mode="floor")
            for n, m in zip(of, among, strict=True)
        )
        return (rows[:, None] * among[1] + columns).flatten()

    return centres(original, run), centres(run, original)


class Listener(TokenReducer):
    """Reduces nothing; keeps what it ``hear``s of the signals of every block it is asked at."""

    name = "listener"

    def __init__(self, hear: Callable[[Signals], Any]) -> None:
        super().__init__()
        self.hear = hear
        self.heard: list[Any] = []

    def decide(self, signals: Signals, state: State) -> Decision | None:
        self.heard.append(self.hear(signals))
        return None


class Host:
    """The plain model, as a reducer that prepares images or plans ahead may ask of it. Made for one forward pass.

    What is computed for a reducer here is booked as that reducer's own work.
    """

    def __init__(self, base: VisionTransformer) -> None:
        self.base = base
        self.spent: Tensor | None = None  # (B,) multiply-adds of what was asked so far

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches that the model was made for."""
        return grid_of(self.base)

    def grid_of(self, images: Tensor) -> Grid:
        """Rows and columns of patches of these images, which may have another size."""
        return grid_of(self.base, images)

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        """Rows and columns of patches of images that are to be resized, and the pixels of a patch."""
        return whole_patches(self.base, images)

    @property
    def width(self) -> int:
        """Features of a token."""
        return int(self.base.embed_dim)

    @property
    def heads(self) -> int:
        attn = self.base.blocks[0].attn
        assert isinstance(attn, Attention)  # check_model saw to it
        return int(attn.num_heads)

    @property
    def depth(self) -> int:
        return len(self.base.blocks)

    @property
    def patches(self) -> int:
        """Patch tokens that enter block 0 at the size the model was made for."""
        rows, columns = self.grid
        return rows * columns

    @property
    def like(self) -> Tensor:
        """A parameter of the model: its dtype and device are those of parameters a reducer adds."""
        return next(self.base.parameters())

    @property
    def shape(self) -> tuple[Any, ...]:
        """What a reducer's parameters may depend on."""
        return self.width, self.heads, self.depth, self.prefix, self.grid

    @property
    def prefix(self) -> int:
        return int(self.base.num_prefix_tokens)

    @staticmethod
    def cross_block(block: Block, asking: Tensor, asked: Tensor, residual: Tensor | None = None) -> Tensor:
        """A block of the model with queries from one sequence and keys and values from another: ``cross_block``."""
        return cross_block(block, asking, asked, residual)

    @property
    def reads_prefix_alone(self) -> bool:
        """The head reads prefix tokens (class, distillation) and no patch."""
        return self.base.global_pool == "token"

    def attention_maps(self, images: Tensor, *, book: bool = True) -> list[Tensor]:
        """Head-mean attention of every block of the plain model, (B, L, L) each: rows are queries. Without gradients.

        Runs the whole model once. ``book=False``: as if the maps were there for nothing.
        """
        base, listener = self.base, Listener(lambda signals: signals.attention().mean(dim=1))
        with torch.no_grad():
            batch = TokenBatch.from_images(
                embed(base, images), prefix=self.prefix, has_class_token=base.has_class_token, track=False
            )
            tracer = Tracer(detail=False)
            tracer.start(batch)
            for index, block in enumerate(base.blocks):
                assert isinstance(block, Block)  # check_model saw to it
                state = State(index, len(base.blocks), batch.layout.longest - self.prefix, training=base.training)
                last = index == len(base.blocks) - 1  # its features are nobody's
                batch = run_block(block, batch, listener, state, tracer, decide_only=last)
        if book:
            self.spent = tracer.cost.executed if self.spent is None else self.spent + tracer.cost.executed
        return listener.heard
