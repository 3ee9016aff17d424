"""Hugging Face's TimeSformer: attention over time, then over space, then the MLP.

**Divided attention** (the default): a frame is a unit, with a copy of the clip's class token, and reducers act in the
attention over space, frame by frame. What they drop is gone for good: the attention over time that comes first in each
block is among the frames in which a place is still there, a place that is left in one frame attends to itself, and so
does a token that lies nowhere (EViT's fused one). The class token takes no part in it. It gets the mean of what its
copies were given over space, as in the library, so that all copies stay equal; the MLP computes it once.

**Joint** attention is that of a plain transformer over the clip, which is one unit; with **space only** each frame is
by itself, and the library's logits are those of frames.

Nothing here imports transformers before a model of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.cost import BlockCost, linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.frames import spread_steps
from reducers.hosts.hf_clips import HFClips, OwnBlock, check_own_layer, check_part
from reducers.hosts.hf_vit import VIT, HFBlock, HFCore, Kind, Made, check_whole, part_of
from reducers.hosts.protocol import OVER, Call, Family, Grid, Stage, StochasticDepth
from reducers.lazy import cached_property
from reducers.maps import Mix, TokenMap
from reducers.masking import masked_softmax
from reducers.tokens import Decided, Layout, TokenBatch, Units

_TIMESFORMER = replace(
    VIT, module="timesformer", layers="encoder.layer", layer="TimesformerLayer",
    attention=("attention", "TimeSformerAttention"), mlps=("TimesformerIntermediate",), heads="num_heads",
    scale="scale", after=None, depth=True, resizes="never",
)  # fmt: skip
_DIVIDED, _SPACE, _JOINT = "divided_space_time", "space_only", "joint_space_time"


@dataclass(frozen=True, eq=False)
class Groups:
    """What attends among itself over time: the tokens of one place in the frames where it is left."""

    rows: Tensor  # (Tp,) packed rows of all patches, group by group, those of one size together; frames in order
    sizes: list[tuple[int, int]]  # (tokens of a group, how many groups have so many), as ``rows`` has them
    tokens: Tensor  # (B,) float64 patches of each clip
    pairs: Tensor  # (B,) float64 pairs of them that meet

    @cached_property
    def number(self) -> Tensor:
        """(Tp,) the group of each of the rows."""
        each = torch.tensor([size for size, many in self.sizes for _ in range(many)], device=self.rows.device)
        return torch.arange(len(each), device=each.device).repeat_interleave(each)


class Lattice:
    """The places of a clip's patches in one pass, and the groups over time that they last made."""

    def __init__(self, untouched: Tensor, patches: int) -> None:
        self.untouched = untouched  # (T,) the places as the embedding gave them
        self.patches = patches  # of a frame
        self._last: tuple[Tensor, Groups] | None = None

    def groups(self, batch: TokenBatch) -> Groups:
        """Of the tokens that are left."""
        assert batch.pos is not None and batch.units is not None
        if self._last is None or self._last[0] is not batch.pos:
            found = self._whole(batch) if batch.pos is self.untouched else self._of_those_left(batch)
            self._last = batch.pos, found
        return self._last[1]

    def _whole(self, batch: TokenBatch) -> Groups:
        units, device = batch.units, batch.x.device
        assert units is not None
        rows = torch.arange(batch.layout.rows, device=device).view(units.samples, units.each, 1 + self.patches)[
            :, :, 1:
        ]
        tokens = torch.full((units.samples,), float(units.each * self.patches), dtype=torch.float64, device=device)
        sizes = [(units.each, units.samples * self.patches)]
        return Groups(rows.transpose(1, 2).flatten(), sizes, tokens, tokens * units.each)

    def _of_those_left(self, batch: TokenBatch) -> Groups:
        units, layout, device = batch.units, batch.layout, batch.x.device
        assert units is not None and batch.pos is not None
        rows = (~layout.is_prefix).nonzero().squeeze(1)
        clip, place = units.sample[layout.row_image[rows]], batch.pos[rows]
        alone = units.samples * self.patches + torch.arange(len(rows), device=device)
        group = torch.where(place >= 0, clip * self.patches + place, alone)
        size = torch.bincount(group)[group] if len(rows) else group
        order = (size * (units.samples * self.patches + len(rows)) + group).sort(stable=True).indices
        many = torch.bincount(size).tolist()  # tokens in groups of each size
        zeros = torch.zeros(units.samples, dtype=torch.float64, device=device)
        return Groups(
            rows[order], [(size, count // size) for size, count in enumerate(many) if count],
            zeros.index_add(0, clip, torch.ones_like(size, dtype=torch.float64)),
            zeros.index_add(0, clip, size.double()),
        )  # fmt: skip


class TimesformerCore(HFCore):
    """One projection for queries, keys and values."""

    def __init__(self, kind: Kind, attn: Any, out: Any, x: Tensor, batch: TokenBatch) -> None:
        super().__init__(kind, attn, x, batch)
        self._out = out

    @property
    def dropout(self) -> float:
        return _dropped(self.attn)

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        return _project(self.attn, x, first, last)

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        added: Tensor = self._out(summed)
        return added


def _dropped(attn: Any) -> float:
    return float(attn.attn_drop.p) if attn.attn_drop.training else 0.0


def _project(attn: Any, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """The parts (T, H, d) of ``TimesformerSelfAttention.qkv``."""
    width, parts = attn.qkv.in_features, last - first
    bias = None if attn.qkv.bias is None else attn.qkv.bias.narrow(0, first * width, parts * width)
    found = F.linear(x, attn.qkv.weight.narrow(0, first * width, parts * width), bias)
    return found.view(len(x), parts, attn.num_heads, width // attn.num_heads).unbind(1)


class TimesformerBlock(OwnBlock):
    """transformers' ``TimesformerLayer`` with plain attention."""

    @property
    def cost(self) -> BlockCost:
        linear, width = self.attn_out.dense.weight.numel(), int(self.attn.qkv.in_features)
        mlp = sum(layer.weight.numel() for layer in self.mlp.modules() if isinstance(layer, nn.Linear))
        return BlockCost(linear, 2 * linear, width, linear, mlp)

    @property
    def mlp(self) -> nn.Module:
        module: Any = self.module
        return nn.Sequential(module.intermediate, module.output)

    def attention(self, x: Tensor, batch: TokenBatch) -> HFCore:
        return TimesformerCore(self.kind, self.attn, self.attn_out, x, batch)


class DividedBlock(TimesformerBlock):
    """transformers' ``TimesformerLayer`` with divided attention: before a reducer's turn over time, then over space."""

    _frames = 1  # of a clip, known once a batch of them has been seen

    def allow(self, reducer: str, token_map: TokenMap) -> None:
        if isinstance(token_map, Mix) and token_map.continued is None:
            raise ReducerError(
                f"{reducer} leaves tokens that are no one patch's continuation, and in every block of this TimeSformer "
                "patches attend over time to those of the same place; use a method that keeps patches or merges them"
            )

    def depth(self, branch: int) -> StochasticDepth | None:
        drop = super().depth(branch)
        return replace(drop, units=self._frames) if drop is not None and branch else drop

    def fixed_macs(self, batch: TokenBatch) -> Tensor:
        layer: Any = self.module
        groups, attention = batch.tables.groups(batch), layer.temporal_attention
        linears = (attention.attention.qkv, attention.output.dense, layer.temporal_dense)
        each = sum(linear.weight.numel() for linear in linears)
        return groups.tokens * each + groups.pairs * (2 * attention.output.dense.in_features)

    def mlp_rows(self, batch: TokenBatch) -> Tensor:
        assert batch.units is not None
        return batch.layout.lengths - (batch.units.number > 0).long()

    def before(self, batch: TokenBatch) -> TokenBatch:
        """Attention over time: patches (B, F, N) -> what the places of each frame were given by the others."""
        layer: Any = self.module
        groups: Groups = batch.tables.groups(batch)
        if not len(groups.rows):
            return batch
        attention, drop = layer.temporal_attention, super().depth(0)
        h = layer.temporal_layernorm(batch.x.index_select(0, groups.rows))
        alive = None if batch.alive is None else batch.alive.index_select(0, groups.rows)
        added = attention.output(self._over_time(attention.attention, h, groups, alive))
        if drop is not None:  # of each place by itself, and what is dropped still has the bias of the next linear
            counts = [size for size, many in groups.sizes for _ in range(many)]
            added = drop(added, Layout.listed(counts, added.device))
        added = layer.temporal_dense(added)
        return replace(batch, x=batch.x.index_add(0, groups.rows, added.to(batch.x.dtype)))

    def _over_time(self, attn: Any, h: Tensor, groups: Groups, alive: Tensor | None) -> Tensor:
        """(Tp, D) -> (Tp, D) values summed inside groups, all groups of one size at once."""
        found, first, parts = [], 0, _project(attn, h, 0, 3)
        for size, many in groups.sizes:
            some = slice(first, first + size * many)
            q, k, v = (part[some].unflatten(0, (many, size)).transpose(1, 2) for part in parts)  # (n, H, f, d)
            if alive is None:
                out = F.scaled_dot_product_attention(q, k, v, dropout_p=_dropped(attn), scale=float(attn.scale))
            else:
                out = _masked(q, k, v, alive[some].view(many, 1, 1, size), float(attn.scale), _dropped(attn))
            found.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
            first = some.stop
        return torch.cat(found)

    def settle(self, batch: TokenBatch) -> TokenBatch:
        """The copies of the class token become their mean, which is the old token and the mean of what was added."""
        units = batch.units
        assert units is not None
        self._frames = units.each
        copies = batch.x.index_select(0, batch.cls)
        mean = copies.unflatten(0, (units.samples, units.each)).mean(1).repeat_interleave(units.each, dim=0)
        return replace(batch, x=batch.x.index_copy(0, batch.cls, mean))

    def after_mlp(self, x: Tensor, layout: Layout) -> Tensor:
        frames = self._frames
        if frames == 1:
            return super().after_mlp(x, layout)
        firsts = layout.starts.view(layout.images // frames, frames)
        once = torch.ones(layout.rows, dtype=torch.bool, device=x.device)
        once[firsts[:, 1:].flatten()] = False
        rows = once.nonzero_static(size=layout.rows - firsts[:, 1:].numel()).squeeze(1)
        back = once.cumsum(0) - 1
        back = back.index_copy(0, firsts[:, 1:].flatten(), back[firsts[:, 0]].repeat_interleave(frames - 1))
        copies = torch.arange(layout.images, device=x.device) % frames > 0
        fewer = Layout(layout.lengths - copies.long(), layout.prefix - copies.long(), len(rows))
        return super().after_mlp(x.index_select(0, rows), fewer).index_select(0, back)


def _masked(q: Tensor, k: Tensor, v: Tensor, alive: Tensor, scale: float, dropout: float) -> Tensor:
    """Attention in which a key counts by what is left of it (n, 1, 1, f), and each token always sees itself."""
    wide = torch.promote_types(q.dtype, torch.float32)
    alive = alive.to(wide)
    seen = alive + (1 - alive) * torch.eye(alive.shape[-1], dtype=wide, device=alive.device)
    logits = q.to(wide) @ k.to(wide).transpose(-2, -1) * scale
    weights = masked_softmax(logits, seen, torch.ones_like(seen, dtype=torch.bool), -1)
    return F.dropout(weights.to(v.dtype), dropout) @ v


class HFTimesformer(HFClips):
    """A TimeSformer, as a whole or its tower alone."""

    table: ClassVar[Mapping[str, Made]] = {
        _TIMESFORMER.path("TimesformerModel"): Made(_TIMESFORMER),
        _TIMESFORMER.path("TimesformerForVideoClassification"): Made(_TIMESFORMER, "timesformer"),
    }
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "timesformer",
            "TimeSformer: attention over time and over space, where reducers act in each frame; joint; space only",
            travels="with divided attention its place, whose tokens attend to each other over time",
        ),
    )

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"over": tuple(OVER)}

    # --- whether it can be driven ---

    def check(self) -> None:
        name, tower = type(self.model).__name__, self.tower
        for where, module in {name: self.model, f"{name}'s tower": tower, f"{name}'s encoder": tower.encoder}.items():
            check_whole(module, where)
        if self.chosen["over"] != "frame" and not self.divided:
            raise UnsupportedModel(
                f"this {name} has attention_type={self.attention_type!r}, where over={self.chosen['over']!r} means "
                "nothing: budgets count "
                + ("the clip, which is one sequence" if self.attention_type == _JOINT else "each frame by itself")
            )
        if not isinstance(tower.config.image_size, int):
            raise UnsupportedModel(f"{name} is known for square images; make it with image_size=…, one number")
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)

    def _check_layer(self, index: int, layer: Any) -> None:
        kind, where = self.kind, f"layer {index}"
        check_own_layer(index, layer, kind)
        attentions = {f"{where}'s attention": layer.attention}
        if layer.attention_type != self.attention_type:
            raise UnsupportedModel(f"{where} has attention_type={layer.attention_type!r} and layer 0 another")
        if layer.attention_type == _DIVIDED:
            over_time = layer._modules["temporal_attention"]
            where_over_time = f"{where}'s temporal_attention"
            check_part(over_time, kind.path("TimeSformerAttention"), where_over_time)
            check_part(over_time.attention, kind.path("TimesformerSelfAttention"), f"{where_over_time}.attention")
            attentions[where_over_time] = over_time
        for place, attention in attentions.items():
            qkv = attention.attention._modules["qkv"]
            if type(qkv) is not nn.Linear:
                raise UnsupportedModel(
                    f"{place} has the qkv {type(qkv).__name__}, whose parts are computed apart; put a plain Linear "
                    "there (merge an adapter first)"
                )
            check_whole(qkv, f"{place}'s qkv")
        path = layer._modules.get("drop_path")
        if type(path) is not nn.Identity and type(path).__name__ != "TimesformerDropPath":
            raise UnsupportedModel(
                f"{where} has its drop_path replaced by a {type(path).__name__}, which would be bypassed; put the "
                "library's own back"
            )
        if path is not None:
            check_whole(path, f"{where}'s drop_path")

    # --- facts ---

    @property
    def attention_type(self) -> str:
        return str(self.layers[0].attention_type)

    @property
    def divided(self) -> bool:
        return self.attention_type == _DIVIDED

    @property
    def by_frame(self) -> bool:
        """Whether a frame is a unit; else the clip is."""
        return self.attention_type != _JOINT

    @property
    def units(self) -> int:
        return self.frames if self.by_frame else 1

    @property
    def between_units(self) -> str | None:
        return "attends over time among frames" if self.divided else None

    @property
    def shares_class_token(self) -> bool:
        return self.divided

    @property
    def tubelet(self) -> tuple[int, int, int]:
        down, across = part_of(self.tower, self.kind.patches).kernel_size
        return 1, int(down), int(across)

    @property
    def stages(self) -> tuple[Stage, ...]:
        (stage,) = super().stages
        return (stage,) if self.over_clip else (replace(stage, grid=self.still),)

    @property
    def decided(self) -> Decided:
        return OVER[self.chosen["over"]]

    @property
    def over_clip(self) -> bool:
        """Whether a budget counts the tokens of a whole clip."""
        return not self.by_frame or self.chosen["over"] == "clip"

    # --- clips ---

    def grid_of(self, images: Tensor) -> Grid:
        return super().grid_of(images if self.over_clip else images[:, :1])

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        tower, kind = self.tower, self.kind
        self.check_embedded(images, resized)
        clips, frames = images.shape[:2]
        images = images.to(part_of(tower, kind.patches).weight.dtype)
        # of resized clips the library takes the positions that are nearest, in space and in time
        x = self._embed_column(images) if resized and self.lattice_of(images)[2] == 1 else tower.embeddings(images)
        if self.attention_type != _SPACE:  # (B, 1 + N F, D), with all frames of a place side by side
            x = self._frame_by_frame(x, frames)
        return self._batch(x, clips, track=track)

    def _embed_column(self, images: Tensor) -> Tensor:
        """Frames one patch wide as the left of two columns, which has the same positions: of a column alone the library
        miscounts the rows.
        """
        _, rows, _ = self.lattice_of(images)
        x = self.tower.embeddings(F.pad(images, (0, self.tubelet[2])))
        lead, patches = x[:, :1], x[:, 1:].unflatten(1, (rows, 2, -1))  # of space only, frames are units already
        return torch.cat([lead, patches[:, :, 0].flatten(1, 2)], dim=1)

    def relocated(self, tables: Lattice | None, original: Tensor, patches: int) -> Lattice | None:  # type: ignore[override]
        return None if tables is None else Lattice(tables.untouched, patches)

    def _batch(self, x: Tensor, clips: int, *, track: bool) -> TokenBatch:
        """Features (units, tokens, D) as the tokens of so many clips."""
        batch = TokenBatch.from_images(x, prefix=1, has_class_token=True, track=track or self.divided)
        if not self.by_frame:
            return batch
        frames, patches = self.frames, x.shape[1] - 1
        places = torch.arange(frames * patches, device=x.device).view(frames, patches)
        units = Units(clips, places, int(self.divided), self.decided)
        if not self.divided:
            return replace(batch, units=units)
        assert batch.pos is not None
        return replace(batch, units=units, tables=Lattice(batch.pos, patches))

    def _frame_by_frame(self, x: Tensor, frames: int) -> Tensor:
        """The library's tokens as units: (B F, 1 + N, D), or of joint attention (B, 1 + F N, D)."""
        patches = x[:, 1:].unflatten(1, ((x.shape[1] - 1) // frames, frames)).transpose(1, 2)  # (B, F, N, D)
        if self.divided:
            lead = x[:, None, :1].expand(-1, frames, -1, -1)
            return torch.cat([lead, patches], dim=2).flatten(0, 1)
        return torch.cat([x[:, :1], patches.flatten(1, 2)], dim=1)

    def _place_by_place(self, x: Tensor, frames: int) -> Tensor:
        """A clip's tokens (B, 1 + F N, D) in the library's order: all frames of a place side by side."""
        patches = x[:, 1:].unflatten(1, (frames, (x.shape[1] - 1) // frames))
        return torch.cat([x[:, :1], patches.transpose(1, 2).flatten(1, 2)], dim=1)

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        convolution = part_of(self.tower, self.kind.patches)
        return int(images.shape[1]) * linear_macs(convolution, images[0, :1].to(convolution.weight.dtype))

    # --- blocks ---

    def block_of(self, index: int) -> HFBlock:
        return (DividedBlock if self.divided else TimesformerBlock)(self.kind, self.layers[index])

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout = batch.layout
        if not layout.rows:
            return None
        assert layout.uniform is not None
        rows, columns = self.still  # which the library's layers take from its configuration, and so the frames
        whole = self.frames == self.made_for and layout.uniform[0] == 1 + rows * columns
        if self.divided and not (whole and batch.pos is batch.tables.untouched):
            return None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        if self.divided:
            by_clip = x.unflatten(0, (batch.samples, self.frames))
            clips = torch.cat([by_clip[:, 0, :1], by_clip[:, :, 1:].flatten(1, 2)], dim=1)
            x = self._place_by_place(clips, self.frames)
        for layer in self.layers[first:last]:
            (x,) = layer(x)
        if self.divided:
            x = self._frame_by_frame(x, self.frames)
        return replace(batch, x=x.flatten(0, 1))

    # --- the head ---

    def pooled(self, batch: TokenBatch) -> Tensor:
        if not self.divided:
            return super().pooled(batch)
        x: Tensor = self.final_norm(batch.x.index_select(0, batch.starts))
        return x

    def head_macs(self, layout: Layout) -> Tensor:
        macs = super().head_macs(layout)
        return macs[:: self.frames] if self.divided else macs

    def answer(self, batch: TokenBatch, call: Call, tokens: Callable[[], Tensor] | None) -> Any:
        return super().answer(batch, call, None if tokens is None else lambda: self._arranged(tokens(), batch))

    def _arranged(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """All tokens, class tokens first (B, P + F N, D), as the library's ``last_hidden_state`` has them."""
        if self.attention_type != _SPACE:
            return self._place_by_place(tokens, self.made_for)
        lead, patches = tokens[:, : self.frames], tokens[:, self.frames :].unflatten(1, (self.made_for, -1))
        if self.frames != self.made_for:  # frames that were left out are told as those before them
            stays = torch.tensor(spread_steps(self.made_for, self.frames), device=tokens.device)
            lead = lead[:, torch.bucketize(torch.arange(self.made_for, device=tokens.device), stays, right=True) - 1]
        return torch.cat([lead[:, :, None], patches], dim=2).flatten(0, 1)


HOST = HFTimesformer
