"""STViT-R and STViT on Swin (``reducers.backbones``): Swin's stages are Swin's here too, the others are closed.

Semantic tokens are made of the whole map, so nothing may be missing there: the blocks of a unit of STViT-R, and those
of STViT's last two stages, run one after another by the module's own steps, keep their numbers and tell what they cost
and how many tokens they leave. In all other stages windows are units, as in ``timm_swin``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from reducers.backbones import stvit_r, stvit_swin
from reducers.backbones.stvit_r import (
    CrossAttention,
    ImageUnit,
    OnMaps,
    OnWindows,
    SemanticBlock,
    STViTRSwin,
    UnitStage,
)
from reducers.backbones.stvit_swin import SemanticStage, Step, STViTSwin
from reducers.cost import BlockCost, linear_macs
from reducers.decision import Decision, advance
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts import SUPPORTED
from reducers.hosts.protocol import Family, Grid, HostBlock, WholeBlock
from reducers.hosts.timm_parts import check_holder, check_whole, mlp_row, pool_patches
from reducers.hosts.timm_swin import SwinBlock, TimmSwin, as_map, on_map
from reducers.maps import Mix
from reducers.tokens import Layout, TokenBatch

_UNIT: tuple[Step, ...] = ("swin", "generate", "refine", "local", "everywhere", "recover")
_RESTATED = tuple(
    (kind, name, getattr(kind, name))
    for kind, names in (
        (ImageUnit, ("forward",)),
        (OnWindows, ("pool", "windows", "joined", "generate", "refine", "local", "everywhere", "recover")),
        (SemanticBlock, ("forward", "attend", "join")),
        (UnitStage, ("forward",)),
        (SemanticStage, ("forward",)),
        (OnMaps, ("forward", "features")),
    )
    for name in names
)


@dataclass(frozen=True, eq=False)
class Inside:
    """What blocks need beside semantic tokens, until they are gone."""

    grid: Grid  # rows and columns of semantic tokens
    image: TokenBatch  # the tokens of the map that they were made of
    carrier: Tensor  # (N0,) which of them carries each place of that map


@dataclass(frozen=True)
class Place:
    """Where a block of a semantic stage is."""

    holder: OnWindows
    block: Any
    step: Step


@dataclass(frozen=True)
class SemanticStep(WholeBlock):
    """A block of a unit that works on semantic tokens, or makes them, or asks them."""

    place: Place

    @property
    def cost(self) -> BlockCost:
        """Of one row and one pair."""
        block = self.place.block
        attn, width = block.attn, block.attn.q.out_features
        return BlockCost(
            attn.q.weight.numel(), attn.kv.weight.numel(), width, attn.proj.weight.numel(), mlp_row(block.mlp)
        )

    def run(self, batch: TokenBatch) -> TokenBatch:
        holder, block, step = self.place.holder, self.place.block, self.place.step
        if step == "generate":
            return _pooled(batch, holder, holder.generate(block, as_map(batch.x, batch)))
        semantic = as_map(batch.x, batch)
        if step == "recover":
            image = batch.tables.image
            return replace(image, x=holder.recover(block, semantic, as_map(image.x, image)).flatten(0, 2))
        if step == "refine":
            image = batch.tables.image
            semantic = holder.refine(block, semantic, as_map(image.x, image))
        else:
            semantic = (holder.local if step == "local" else holder.everywhere)(block, semantic)
        return replace(batch, x=semantic.flatten(0, 2))

    def macs(self, batch: TokenBatch) -> Tensor:
        queries, keys, groups = self._rows(batch)
        rows = torch.full(
            (batch.layout.images,), float(queries), dtype=torch.float64, device=batch.layout.lengths.device
        )
        asked = torch.full_like(rows, float(keys))
        return groups * self.cost.macs(queries=rows, keys=asked, outputs=rows, mlp=rows)

    def _rows(self, batch: TokenBatch) -> tuple[int, int, int]:
        """Those who ask, what each of them asks, and how many such groups an image has."""
        step, semantics, window = self.place.step, self.place.holder.semantics, self.place.holder.window
        rows, columns = batch.tables.grid
        within = semantics.side**2
        if step == "generate":
            return within, within + semantics.keys**2, rows * columns // window**2
        tokens = rows * columns
        if step == "local":
            return within, within, tokens // within
        if step == "everywhere":
            return tokens, tokens, 1
        high, wide = batch.tables.image.tables.grid
        return (tokens, tokens + high * wide, 1) if step == "refine" else (high * wide, tokens, 1)


def _pooled(batch: TokenBatch, holder: OnWindows, semantic: Tensor) -> TokenBatch:
    """Semantic tokens (B, h, w, D) in place of the patches, each of which is carried by that in whose bin it lies."""
    grid, (rows, columns) = batch.tables.grid, semantic.shape[1:3]
    weights = _bins(grid, holder.window, holder.semantics.side, semantic.device)
    images = batch.layout.images
    token_map = Mix(
        batch.layout, Layout.alike(images, rows * columns, 0, semantic.device), weights.expand(images, -1, -1)
    )
    left = advance(batch, Decision(token_map, semantic.flatten(0, 2)))
    pos = None if left.pos is None else torch.full_like(left.pos, -1)
    return replace(left, received=None, pos=pos, tables=Inside((int(rows), int(columns)), batch, weights.argmax(0)))


def _bins(grid: Grid, window: int, side: int, device: torch.device) -> Tensor:
    """Which patches each semantic token was pooled of, (M, N) float32; one in several bins is shared out evenly."""
    sides = []
    for extent in grid:
        place = torch.arange(extent, device=device)
        number = torch.arange(extent // window * side, device=device)[:, None]
        inside, first = number % side, number // side * window
        begin = first + (inside * window).div(side, rounding_mode="floor")
        behind = first + ((inside + 1) * window + side - 1).div(side, rounding_mode="floor")
        sides.append((place >= begin) & (place < behind))
    rows, columns = sides
    found = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1).float()
    return found / found.sum(dim=0)


class STViTHost(TimmSwin):
    """``STViTRSwin`` in its form for classification, and ``STViTSwin``."""

    model: Any
    library: ClassVar[str] = "sievit"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (STViTRSwin, STViTSwin)
    blocks_in: ClassVar[type[nn.Module]] = nn.ModuleList
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "stvit_r",
            "STViT-R on Swin: units of semantic tokens in the third stage (`reducers.backbones.stvit_r`); reducers act "
            "in windows of the other stages",
            travels="its place, as in Swin",
        ),
        Family(
            "stvit_swin",
            "STViT on Swin: semantic tokens from the third stage on (`reducers.backbones.stvit_swin`); reducers act in "
            "windows of the first two",
            travels="its place, as in Swin",
        ),
    )

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        return list(stvit_r.PRESETS if family.name == "stvit_r" else stvit_swin.PRESETS)

    # --- whether it can be driven ---

    def check(self) -> None:
        self.check_model("layers")
        model = self.model
        if getattr(model, "form", "classification") != "classification":
            raise UnsupportedModel(
                "an STViTRSwin(form='detection') gives the maps of its stages and no logits, and takes images of any "
                "size; make it with form='classification'"
            )
        if "features" in model.__dict__:
            raise UnsupportedModel(f"the model's features was replaced, which would be bypassed; undo it. {SUPPORTED}.")
        self.check_restated()
        self._check_steps()
        index = 0
        for number, stage in enumerate(model.layers):
            if type(stage) is UnitStage:
                index = self._check_units(number, stage, index)
            elif type(stage) is SemanticStage:
                index = self._check_semantic(number, stage, index)
            else:
                index = self.check_stage(number, stage, index)

    def _check_steps(self) -> None:
        for kind, name, known in _RESTATED:
            if getattr(kind, name) is not known:
                raise UnsupportedModel(
                    f"{kind.__name__}.{name} was replaced for the whole process, and the reduced model would bypass "
                    f"the new one; undo that. {SUPPORTED}."
                )

    def _check_units(self, number: int, stage: UnitStage, index: int) -> int:
        """Refuse units that are not run as they are; the index behind their last block."""
        _check_merging(number, stage.downsample)
        check_holder(stage.units, nn.Sequential, f"stage {number}")
        for module, name in ((stage, ""), (stage.units, "'s units")):
            check_whole(module, f"stage {number}{name}")
        for unit in stage.units:
            if type(unit) is not ImageUnit:
                raise UnsupportedModel(f"a unit of stage {number} is a {type(unit).__name__}. {SUPPORTED}.")
            check_whole(unit, f"a unit of stage {number}")
            index = self._check_steps_of(unit, _UNIT, index)
        return index

    def _check_semantic(self, number: int, stage: SemanticStage, index: int) -> int:
        """The same of a stage that ends in semantic tokens."""
        _check_merging(number, stage.downsample)
        check_whole(stage, f"stage {number}")
        return self._check_steps_of(stage, stage.steps, index)

    def _check_steps_of(self, holder: OnWindows, steps: tuple[Step, ...], index: int) -> int:
        replaced = [name for kind, name, _ in _RESTATED if kind is OnWindows and name in holder.__dict__]
        if replaced:
            raise UnsupportedModel(
                f"the {replaced[0]} of what holds block {index} was replaced, which would be bypassed. {SUPPORTED}."
            )
        for block, step in zip(holder.blocks, steps, strict=True):
            if step == "swin":
                self.check_block(index, block)
            else:
                check_semantic(index, block)
            index += 1
        return index

    # --- facts ---

    @property
    def _places(self) -> list[Place]:
        """Every block of the model; of Swin's own stages without a holder."""
        found: list[Any] = []
        for stage in self._layers:
            if isinstance(stage, UnitStage):
                units: Any = stage.units
                for unit in units:
                    found += places_of(unit, _UNIT)
            elif isinstance(stage, SemanticStage):
                found += places_of(stage, stage.steps)
            else:
                found += [Place(stage, block, "swin") for block in stage.blocks]
        return found

    def blocks_of(self, stage: Any) -> list[Any]:
        if isinstance(stage, UnitStage):
            return [block for unit in stage.units for block in unit.blocks]  # type: ignore[union-attr]
        return super().blocks_of(stage)

    def sizes_of(self, stage: Any) -> tuple[Grid, int, int]:
        if not isinstance(stage, SemanticStage):
            return super().sizes_of(stage)
        attn: Any = stage.blocks[-1].attn
        return stage.map_size, attn.q.in_features, attn.heads

    @property
    def closed(self) -> Mapping[int, str]:
        why = "semantic tokens are made of the whole map in that stage or before it, and it takes no reducer"
        return {index: why for index, place in enumerate(self._places) if isinstance(place.holder, OnWindows)}

    @property
    def classes(self) -> int:
        return int(self.model.classes)

    @property
    def head_words(self) -> str:
        return "its head reads the mean of all patches"

    @property
    def checkpoints(self) -> bool:
        return False

    @property
    def channels(self) -> int:
        return int(self.model.channels)

    @property
    def image_size(self) -> tuple[int, int]:
        return int(self.model.image_size), int(self.model.image_size)

    # --- images and blocks ---

    def grid_of(self, images: Tensor) -> Grid:
        self._check_size(images)
        return self.grid

    def _check_size(self, images: Tensor) -> None:
        if tuple(images.shape[-2:]) != self.image_size:
            raise ReducerError(
                f"images of {images.shape[-2]} x {images.shape[-1]} and a model for {self.image_size[0]} x "
                f"{self.image_size[1]}; make it with image_size=…"
            )

    def whole_patches(self, images: Tensor) -> NoReturn:
        raise ReducerError(
            f"images cannot be resized for an {type(self.model).__name__}, which is made for one size: image_size=…"
        )

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        assert not resized  # whole_patches saw to it
        self._check_size(images)
        return on_map(self.model.stem(images))

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return linear_macs(self.model.stem, images[:1])

    def block(self, index: int) -> HostBlock:
        place = self._places[index]
        assert place.step == "swin"  # else it is whole
        return SwinBlock(place.block)

    def whole(self, index: int) -> WholeBlock | None:
        place = self._places[index]
        return None if place.step == "swin" else SemanticStep(place)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        places = self._places[first:last]
        if any(place.step != "swin" for place in places):
            return None
        return super().plain(first, last, batch)

    def enter(self, block: int, batch: TokenBatch, whole: Callable[[], Tensor]) -> TokenBatch:
        if isinstance(batch.tables, Inside):
            return on_map(self._merging(block)(as_map(batch.x, batch)))
        return super().enter(block, batch, whole)

    def parents(self, block: int, batch: TokenBatch) -> Tensor:
        merged = super().parents(block, batch)
        return merged[batch.tables.carrier] if isinstance(batch.tables, Inside) else merged

    # --- the head ---

    def classify(self, batch: TokenBatch) -> Tensor:
        logits: Tensor = self.model.head(self.pooled(batch))
        return logits

    @property
    def classifier_macs(self) -> int:
        head = self.model.head
        return int(head.weight.numel()) if isinstance(head, nn.Linear) else 0

    def pooled(self, batch: TokenBatch) -> Tensor:
        if isinstance(
            batch.tables, Inside
        ):  # of semantic tokens all count alike, however many patches are in their bin
            batch = replace(batch, size=torch.ones_like(batch.size))
        return pool_patches(batch, self.model.norm(batch.x), "avg")


def places_of(holder: OnWindows, steps: tuple[Step, ...]) -> list[Place]:
    """The blocks of a holder and what each does."""
    return [Place(holder, block, step) for block, step in zip(holder.blocks, steps, strict=True)]


def _check_merging(number: int, merging: nn.Module) -> None:
    if type(merging) is not PatchMerging:
        raise UnsupportedModel(f"stage {number} begins with a {type(merging).__name__}. {SUPPORTED}.")


def check_semantic(index: int, block: nn.Module) -> None:
    """Refuse a block of semantic tokens that is not run as it is; its norms, attention, scales and MLP are called."""
    if type(block) is not SemanticBlock:
        raise UnsupportedModel(f"block {index} is a {type(block).__name__}, not a SemanticBlock. {SUPPORTED}.")
    check_whole(block, f"block {index}")
    for name, kinds in (("attn", (CrossAttention,)), ("mlp", (Mlp,))):
        part = block._modules[name]
        if type(part) not in kinds or "forward" in part.__dict__:
            raise UnsupportedModel(
                f"block {index} has its {name} replaced by a {type(part).__name__}, whose cost is not known. "
                f"{SUPPORTED}."
            )


HOST = STViTHost
