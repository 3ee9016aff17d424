"""X-ViT (``reducers.backbones.xvit``): a frame is a unit, and keys and values come in part from the frames beside it.

Reducers act inside frames and see shifted keys and values; each frame has a class token of its own. What is exchanged
is exchanged by place: a token hears of the token of the neighbouring frame that lies in its place now (of a merged one
its heaviest member's). Where that place is gone, the option ``missing`` says what stands in its channels: ``zero``, as
beyond the ends of a clip, or ``self``, the token's own. Tokens that lie nowhere (a fused one, slots of a learned
pooling) hear of those of the same number among their like.

The option ``over`` says what a budget counts: each ``frame``, the whole ``clip``, or with ``tube`` the places that all
frames keep, so that nothing is missing.

Whether the authors of ATS, whose survivors are sorted by score, shifted by place or by rank, nobody knows: no public
text or code says so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reducers.backbones.xvit import PRESETS, SHARE, ClipHead, ShiftedAttention, XViT, shift_in_time
from reducers.cost import linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.frames import spread_steps
from reducers.hosts import SUPPORTED
from reducers.hosts.pools import class_or_mean
from reducers.hosts.protocol import OVER, Family, Grid, Host, HostBlock, Stage
from reducers.hosts.timm_parts import (
    check_attention,
    check_kind,
    check_rest,
    check_unreplaced,
    check_whole,
    entrance,
    mlp_row,
)
from reducers.hosts.timm_vit import TimmBlock, TimmCore, TimmViT
from reducers.lazy import cached_property
from reducers.reducer import Input
from reducers.tokens import Decided, Layout, TokenBatch, Units

_RESTATED = tuple((kind, kind.forward) for kind in (Block, ShiftedAttention, ClipHead))
_STEPS = ("tokens", "forward_features", "forward_head")  # of the model, restated here


@dataclass(frozen=True, eq=False)
class Clips:
    """What blocks need beside a batch: how its units follow one another in time."""

    frames: int  # units of a clip
    group: int  # frames in a row that exchange
    places: int  # patches of a frame
    untouched: Tensor  # (T,) the places as they were when nothing had been reduced


class ShiftedCore(TimmCore):
    """``ShiftedAttention`` over what is left of frames."""

    def __init__(self, attn: Attention, x: Tensor, batch: TokenBatch, missing: str) -> None:
        super().__init__(attn, x, batch.layout)
        self.batch = batch
        self.missing = missing

    @property
    def scale(self) -> float:
        return float(self.attn.head_dim**-0.5)

    @property
    def dropout(self) -> float:
        return float(self.attn.attn_drop.p) if self.attn.training else 0.0

    def mix(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._shifted(keys), self._shifted(values)

    def _shifted(self, part: Tensor) -> Tensor:
        """Keys or values (T, H, d), their channels counted through the heads."""
        clips: Clips = self.batch.tables
        if clips.group == 1:
            return part
        if self.batch.pos is clips.untouched and self.batch.alive is None:
            assert self.layout.uniform is not None
            whole = part.reshape(self.layout.images, self.layout.uniform[0], part.shape[1] * part.shape[2])
            return shift_in_time(whole, clips.group).reshape(part.shape)
        flat = part.flatten(1)
        share = flat.shape[1] // SHARE
        behind, before, rest = flat.split([share, share, flat.shape[1] - 2 * share], dim=1)
        return torch.cat([self._of(behind, 1), self._of(before, -1), rest], dim=1).view(part.shape)

    def _of(self, channels: Tensor, step: int) -> Tensor:
        """The channels (T, c) that tokens get from the neighbours ``step`` frames behind."""
        rows, has_neighbour = self._neighbours[step]
        if not len(rows):
            return channels
        found = channels[rows.clamp(min=0)]
        there = (rows >= 0)[:, None]
        alive = self.batch.alive
        if alive is not None:  # what a training mask dropped of the neighbours is missing as well
            share = (alive[rows.clamp(min=0)] * there[:, 0]).to(channels.dtype)[:, None]
            heard = found * share
            return heard if self.missing == "zero" else heard + channels * (1 - share) * has_neighbour[:, None]
        instead = torch.zeros_like(channels)
        if self.missing == "self":
            instead = torch.where(has_neighbour[:, None], channels, instead)
        return torch.where(there, found, instead)

    @cached_property
    def _neighbours(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each step in time the row (T,) of the token in the same place, -1 where there is none; and which tokens
        (T,) have a frame there at all.
        """
        layout, clips = self.layout, self.batch.tables
        pos, unit = self.batch.pos, layout.row_image
        assert pos is not None
        placeless = (pos < 0) & ~layout.is_prefix
        before = placeless.long().cumsum(0) - placeless.long()  # placeless tokens before each row
        first = before[layout.starts[unit]]
        # in a frame's row of slots: the class token, tokens that lie nowhere, and the places
        slot = torch.where(placeless, 1 + before - first, 1 + layout.longest + pos).masked_fill(layout.is_prefix, 0)
        slots = pos.new_full((layout.images, 1 + layout.longest + clips.places), -1)
        slots[unit, slot] = torch.arange(layout.rows, device=pos.device)
        number = unit % clips.frames % clips.group
        found = {}
        for step, end in ((1, clips.group - 1), (-1, 0)):
            has_neighbour = number != end
            rows = slots[torch.where(has_neighbour, unit + step, unit), slot]
            found[step] = rows.masked_fill(~has_neighbour, -1), has_neighbour
        return found


class ShiftedBlock(TimmBlock):
    """timm's ``Block`` with ``ShiftedAttention``."""

    def __init__(self, module: Block, missing: str) -> None:
        super().__init__(module)
        self.missing = missing

    def attention(self, x: Tensor, batch: TokenBatch) -> ShiftedCore:
        attn: Any = self.module.attn
        return ShiftedCore(attn, x, batch, self.missing)


class XViTHost(TimmViT):
    """``XViT``."""

    model: XViT
    library: ClassVar[str] = "sievit"
    inputs: ClassVar[Input] = "clips"
    options: ClassVar[dict[str, tuple[str, ...]]] = {"over": tuple(OVER), "missing": ("zero", "self")}
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (XViT,)
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "xvit",
            "X-ViT: clips, frame by frame, keys and values shifted in time (`reducers.backbones.xvit`)",
            travels="its place: tokens hear of those of the neighbouring frames that lie there",
        ),
    )

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        return list(PRESETS)

    # --- whether it can be driven ---

    def check(self) -> None:
        super().check()
        model = self.model
        if replaced := [step for step in _STEPS if step in model.__dict__]:
            raise UnsupportedModel(
                f"the model's {replaced[0]} was replaced by another function, which would be bypassed; undo that. "
                f"{SUPPORTED}."
            )
        head: nn.Module = model._modules["head"]  # type: ignore[assignment]
        if type(head) is not ClipHead:
            raise UnsupportedModel(f"the head {type(head).__name__} is not supported. {SUPPORTED}.")
        check_whole(head, "the model's head")
        groups = {int(block.attn.group) for block in model.blocks}  # type: ignore[union-attr,arg-type]
        if groups != {model.group}:
            raise UnsupportedModel(
                f"blocks exchange in groups of {sorted(groups)} frames and the model's group is {model.group}; make "
                f"the model anew: XViT(group=…). {SUPPORTED}."
            )

    def check_restated(self) -> None:
        check_unreplaced(*_RESTATED)

    def check_block(self, index: int, block: nn.Module) -> None:
        check_kind(index, block, (Block,))
        check_attention(index, block, (ShiftedAttention,))
        check_rest(index, block)

    # --- facts ---

    @property
    def head_words(self) -> str:
        return "its head reads the frames' class tokens"

    _length: int | None = None  # frames of shortened clips

    @property
    def frames(self) -> int:
        return self.model.num_frames if self._length is None else self._length

    @property
    def tubelet(self) -> tuple[int, int, int]:
        down, across = self.patcher.feat_ratio(as_scalar=False)
        return 1, int(down), int(across)

    @property
    def units(self) -> int:
        return self.frames

    @property
    def decided(self) -> Decided:
        return OVER[self.chosen["over"]]

    @property
    def stages(self) -> tuple[Stage, ...]:
        (stage,) = super().stages
        if self.decided != "together" or stage.grid is None:
            return (stage,)
        rows, columns = stage.grid
        return (replace(stage, grid=(self.frames * rows, columns)),)

    # --- clips ---

    def grid_of(self, images: Tensor) -> Grid:
        """Of what a budget counts: the grids of a clip lie one below the other."""
        steps, rows, columns = self.lattice_of(images)
        return (steps * rows, columns) if self.decided == "together" else (rows, columns)

    def lattice_of(self, images: Tensor) -> tuple[int, int, int]:
        return int(images.shape[1]), *super().grid_of(images)

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        if images.dim() != 5:
            raise ReducerError(f"an XViT reads clips (B, F, C, H, W); got {tuple(images.shape)}")
        _, patch = super().whole_patches(images)
        return self.lattice_of(images)[1:], patch

    def whole_steps(self, images: Tensor) -> tuple[int, int]:
        if images.dim() != 5 or images.shape[1] != self.frames:
            raise ReducerError(f"clips of shape {tuple(images.shape)}: this XViT takes (B, {self.frames}, C, H, W)")
        return self.frames, self.frames // self.model.group

    def shortened(self, images: Tensor) -> Host:
        twin = copy.copy(self)
        twin._length = int(images.shape[1])
        return twin

    def relocated(self, tables: Clips, original: Tensor, patches: int) -> Clips:
        return replace(tables, places=patches)

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        """Clips (B, F, C, H, W); frames are units. Of shortened clips each group keeps as many frames as any other,
        which go on to exchange among themselves, with the time embeddings that they had [D].
        """
        model, frames = self.model, self.frames
        groups = model.num_frames // model.group
        x = self._embed_resized(images) if resized else model.tokens(images)
        batch = TokenBatch.from_images(x, prefix=1, has_class_token=True, track=True)
        assert batch.pos is not None and batch.layout.uniform is not None
        patches = batch.layout.uniform[0] - 1
        places = torch.arange(frames * patches, device=images.device).view(frames, patches)
        units = Units(len(images), places, decided=self.decided)
        return replace(batch, units=units, tables=Clips(frames, frames // groups, patches, batch.pos))

    def _embed_resized(self, images: Tensor) -> Tensor:
        """As ``XViT.tokens``, with positions interpolated as those of images are."""
        model, through = self.model, entrance(self.model, resized=True)
        if images.shape[1] != self.frames:
            raise ReducerError(f"clips of shape {tuple(images.shape)}: this XViT takes (B, {self.frames}, C, H, W)")
        x = through._pos_embed(through.patch_embed(images.flatten(0, 1)))
        chosen = [number % model.group for number in spread_steps(model.num_frames, self.frames)]
        x = x.unflatten(0, (len(images), self.frames)) + model.time_embed[:, chosen]
        entering: Tensor = model.norm_pre(x.flatten(0, 1))
        return entering

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return self.frames * linear_macs(entrance(self.model, resized=resized).patch_embed, images[0, :1])

    # --- blocks ---

    def block(self, index: int) -> HostBlock:
        block = self.model.blocks[index]
        assert isinstance(block, Block)  # check saw to it
        return ShiftedBlock(block, self.chosen["missing"])

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        """As long as every token is there: after that, tokens of equal number are of unequal places."""
        whole = batch.pos is batch.tables.untouched and self._length is None  # blocks know their own groups alone
        return super().plain(first, last, batch) if whole else None

    # --- the head ---

    def classify(self, batch: TokenBatch) -> Tensor:
        logits: Tensor = self.model.head.fc(self.pooled(batch))
        return logits

    def pooled(self, batch: TokenBatch) -> Tensor:
        features = class_or_mean(batch, self.model.norm(batch.x), 1)
        pooled: Tensor = self.model.head.pooled(features.view(-1, self.frames, features.shape[-1]))
        return pooled

    @property
    def classifier_macs(self) -> int:
        head = self.model.head.fc
        return int(head.weight.numel()) if isinstance(head, nn.Linear) else 0

    def head_macs(self, layout: Layout) -> Tensor:
        head, rows = self.model.head, self.frames + 1
        attn, width = head.block.attn, self.model.embed_dim
        macs = rows * (attn.qkv.weight.numel() + attn.proj.weight.numel() + mlp_row(head.block.mlp) + 2 * rows * width)
        macs += head.pre_logits.weight.numel() + self.classifier_macs
        clips = layout.images // self.frames
        return torch.full((clips,), float(macs), dtype=torch.float64, device=layout.lengths.device)


HOST = XViTHost
