"""timm's ``SwinTransformer``: attention in windows, which are units of their own in every block.

A unit is a window, or in a block of shifted windows the part of one that lies together on the map: what timm's mask
forbids is another unit, so nothing is masked here. Windows are formed anew in each block from the places of the tokens
that are left; one that has lost all of them is legal. Where windows reach over the edge of the map, timm fills them
with zeros, which are keys like any other: they are keys here, and no tokens.

Costs are those of timm's computation as everywhere in print: a query meets all keys of its window, masked and padded
ones included. Padded places cost nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, NoReturn

import torch
from timm.layers import ClassifierHead
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts import SUPPORTED
from reducers.hosts.protocol import Family, Grid, Grouping, HostBlock, Spread, Stage, StochasticDepth
from reducers.hosts.timm_beit import BiasedBlock, BiasedCore
from reducers.hosts.timm_parts import (
    TimmHost,
    check_attention,
    check_holder,
    check_kind,
    check_rest,
    check_unreplaced,
    check_whole,
    pool_patches,
)
from reducers.lazy import cached_property
from reducers.maps import Merge, Mix, TokenMap
from reducers.tokens import Layout, TokenBatch, Units

_RESTATED = tuple(
    (kind, kind.forward) for kind in (SwinTransformerStage, SwinTransformerBlock, WindowAttention, ClassifierHead)
)
_ATTN = SwinTransformerBlock._attn
_POOLS = ("avg", "max", "avgmax")


@dataclass(frozen=True, eq=False)
class Windows:
    """The units of a block on a map whose patches are all there. ``w``: places of a window."""

    unit: Tensor  # (N0,) the unit in which each patch lies
    local: Tensor  # (N0,) its place in the window
    order: Tensor  # (N0,) the patches unit by unit
    places: Tensor  # (units, w) the patch in each place of the unit's window, -1 where it has none
    counts: list[int]  # patches of each unit
    window: Tensor  # (units,) the window that each unit is a part of
    padded: Tensor  # (units, w) bool: places beyond the map that are keys of the unit
    pads: list[int]  # how many these are
    beyond: Tensor  # (windows,) int64: places of each window beyond the map, in whatever part
    grid: Grid  # rows and columns of a window

    @property
    def each(self) -> int:
        """Units of an image."""
        return len(self.counts)

    @cached_property
    def whole(self) -> bool:
        """Whether no window is cut or reaches over the edge."""
        return self.each == len(self.beyond) and not bool(self.beyond.any())

    @property
    def reaches_over(self) -> bool:
        """Whether any place beyond the edge of the map is a key."""
        return any(self.pads)


@lru_cache(maxsize=256)
def windows(grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Windows:
    """The map rolled by ``shift``, filled up to whole windows, and in the last of them cut as timm's mask does."""
    with torch.inference_mode(False):  # what is remembered must serve a pass with gradients too
        if device.type != "cpu":
            return _on(windows(grid, window, shift, torch.device("cpu")), device)
        return _cut(grid, window, shift)


def _cut(grid: Grid, window: Grid, shift: Grid) -> Windows:
    sides = [_along(*each) for each in zip(grid, window, shift, strict=True)]
    (rows, high, down), (columns, wide, across) = sides
    number = (rows // high)[:, None] * (len(columns) // wide) + columns // wide
    part = ((number * 3 + down[:, None]) * 3 + across).flatten()
    local = ((rows % high)[:, None] * wide + columns % wide).flatten()
    real = ((rows < grid[0])[:, None] & (columns < grid[1])).flatten()
    known = part[real].unique()
    unit = torch.searchsorted(known, part)
    inside = unit.clamp(max=len(known) - 1)
    of_unit = known[inside] == part  # places beyond the map may lie in parts without any patch
    patch = (((rows + shift[0]) % grid[0])[:, None] * grid[1] + (columns + shift[1]) % grid[1]).flatten()
    places = torch.full((len(known), high * wide), -1, dtype=torch.int64)
    places[unit[real], local[real]] = patch[real]
    padded = torch.zeros(len(known), high * wide, dtype=torch.bool)
    beyond = of_unit & ~real
    padded[inside[beyond], local[beyond]] = True
    by_patch = patch[real].argsort()
    unit_of, local_of = unit[real][by_patch], local[real][by_patch]
    counts = torch.bincount(unit_of, minlength=len(known)).tolist()
    over = torch.bincount(number.flatten()[~real], minlength=int(number.max()) + 1)
    return Windows(
        unit_of, local_of, unit_of.argsort(stable=True), places, counts, known // 9, padded,
        padded.sum(1).tolist(), over, (high, wide),
    )  # fmt: skip


def _on(found: Windows, device: torch.device) -> Windows:
    """The same on another device."""
    told: dict[str, Any] = {each.name: getattr(found, each.name) for each in fields(found)}
    moved: dict[str, Any] = {name: part.to(device) for name, part in told.items() if isinstance(part, Tensor)}
    return replace(found, **moved)


def _along(size: int, window: int, shift: int) -> tuple[Tensor, int, Tensor]:
    """One side of the map: its places rolled and filled up, the window's side, and which part of the cut ones each is
    in.
    """
    places = torch.arange(math.ceil(size / window) * window)
    cut = torch.zeros_like(places)
    if shift:
        cut = (places >= len(places) - window).long() + (places >= len(places) - shift)
    return places, window, cut


@dataclass(frozen=True, eq=False)
class Map:
    """What blocks need beside a batch, in one stage of a pass."""

    grid: Grid
    untouched: Tensor  # (T,) the places as they were when the stage began


class WindowCore(BiasedCore):
    """timm's ``WindowAttention`` over units that hold what is left of windows."""

    def __init__(self, attn: Any, x: Tensor, batch: TokenBatch, windows: Windows) -> None:
        super().__init__(attn, x, batch)
        self.windows = windows

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        parts = super().project(x, first, last)
        if not self.windows.reaches_over or last == 1:
            return parts
        beyond = super().project(x.new_zeros(1, x.shape[1]), max(first, 1), last)  # timm's zeros, through the biases
        lead = parts[: 1 - first] if first < 1 else ()
        return (*lead, *(self._widen(part, pad) for part, pad in zip(parts[len(lead) :], beyond, strict=True)))

    @cached_property
    def keys_layout(self) -> Layout:
        """Each unit's tokens, and behind them the places beyond the map."""
        if not self.windows.reaches_over:
            return self.layout
        pads = self.windows.pads * self._samples
        counts = [tokens + beyond for tokens, beyond in zip(self.layout.counts, pads, strict=True)]
        return Layout.listed(counts, self.x.device)

    @cached_property
    def _slot(self) -> Tensor:
        """(T,) the key of each token."""
        return self.keys_layout.starts[self.layout.row_image] + self.layout.row_index

    def _widen(self, values: Tensor, beyond: Tensor) -> Tensor:
        """From tokens (T, ...) to keys (K, ...); ``beyond`` (1, ...) for the others."""
        keys = beyond.expand(self.keys_layout.rows, *values.shape[1:])
        return keys.index_copy(0, self._slot, values.to(beyond.dtype))

    def to_tokens(self, cells: Tensor, how: Spread) -> Tensor:
        return cells if self.keys_layout is self.layout else cells.index_select(0, self._slot)

    def biases(self, by_token: Tensor) -> Tensor:
        return self._of_keys(by_token, 0)

    def seen(self, alive: Tensor) -> Tensor:
        return self._of_keys(alive, 1)

    def _of_keys(self, values: Tensor, beyond: float) -> Tensor:
        """From tokens (T,) to keys (K,)."""
        if self.keys_layout is self.layout:
            return values
        return self._widen(values, values.new_full((1,), beyond))

    @property
    def _samples(self) -> int:
        return self.batch.samples

    def pair_bias(self) -> Tensor:
        attn: Any = self.attn
        whole: Tensor = attn._get_rel_pos_bias()  # (1, H, w, w)
        layout, keys, nowhere = self.layout, self.keys_layout, whole.shape[-1]
        if layout.uniform == (nowhere, 0):  # whole windows, in order
            return whole
        assert self.batch.pos is not None
        asking = layout.pad(self.batch.pos, fill=nowhere)  # (U, L)
        if keys is layout:
            asked = asking
        else:
            places = self.windows.padded.nonzero()[:, 1].repeat(self._samples)  # of the keys that are no tokens
            packed = torch.empty(keys.rows, dtype=torch.int64, device=places.device)
            other = torch.ones(keys.rows, dtype=torch.bool, device=places.device).index_fill_(0, self._slot, False)
            packed[other], packed[self._slot] = places, self.batch.pos
            asked = keys.pad(packed, fill=nowhere)
        table = F.pad(whole[0], (0, 1, 0, 1))  # (H, w + 1, w + 1): nothing is added nowhere
        return table[:, asking[:, :, None], asked[:, None, :]].transpose(0, 1)


class SwinBlock(BiasedBlock):
    """timm's ``SwinTransformerBlock``."""

    module: SwinTransformerBlock
    _each = 1  # units of an image, which stochastic depth drops together; known once there is a grouping

    def scale(self, branch: int) -> None:  # type: ignore[override]  # it has none
        return None

    def depth(self, branch: int) -> StochasticDepth | None:
        drop = super().depth(branch)
        return None if drop is None else replace(drop, units=self._each)

    def windows(self, batch: TokenBatch) -> Windows:
        """Of the stage's map in this block."""
        module = self.module
        (high, wide), (down, across) = module.window_size, module.shift_size
        return windows(batch.tables.grid, (int(high), int(wide)), (int(down), int(across)), batch.x.device)

    def grouping(self, batch: TokenBatch) -> Grouping:
        found, layout, device = self.windows(batch), batch.layout, batch.x.device
        self._each = found.each
        units = Units(layout.images, found.places)
        most = max(found.counts)
        assert batch.pos is not None
        if batch.pos is batch.tables.untouched:
            images = torch.arange(layout.images, device=device)[:, None]
            rows = (images * len(found.unit) + found.order).flatten()
            pos = found.local[found.order].repeat(layout.images)
            return Grouping(rows, Layout.listed(found.counts * layout.images, device), pos, units, found.grid, most)
        unit = layout.row_image * found.each + found.unit[batch.pos]
        rows = unit.sort(stable=True).indices
        counts = torch.bincount(unit, minlength=layout.images * found.each).tolist()
        pos = found.local[batch.pos[rows]]
        return Grouping(rows, Layout.listed(counts, device), pos, units, found.grid, most)

    def allow(self, reducer: str, token_map: TokenMap) -> None:
        mixed = isinstance(token_map, Mix) and token_map.continued is None
        if mixed or (isinstance(token_map, Merge) and token_map.ownerless is not None):
            raise ReducerError(
                f"{reducer} leaves tokens that are no one patch's continuation and lie nowhere, and every block of "
                "this SwinTransformer forms its windows from the places of tokens; use a method that keeps patches or "
                "merges them into one of them (evit with fuse=False, tome, …)"
            )

    def attention(self, x: Tensor, batch: TokenBatch) -> WindowCore:
        return WindowCore(self.module.attn, x, batch, self.windows(batch))

    def keys_beside(self, batch: TokenBatch) -> Tensor | None:
        found = self.windows(batch)
        if found.whole:
            return None
        lengths = batch.layout.lengths.view(-1, found.each)
        inside = lengths.new_zeros(len(lengths), len(found.beyond)).index_add_(1, found.window, lengths)
        return ((inside + found.beyond)[:, found.window] - lengths).flatten()


class TimmSwin(TimmHost):
    """timm's ``SwinTransformer``."""

    model: SwinTransformer
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"fill": ("last", "owner", "zero")}
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer,)
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "swin_transformer",
            "Swin: attention in windows, reducers act inside them",
            travels="its place: windows are formed from places in every block, and biases of pairs go by them",
        ),
    )

    # --- whether it can be driven ---

    def check(self) -> None:
        self.check_model("layers")
        self.check_restated()
        index = 0
        for number, stage in enumerate(self.model.layers._modules.values()):
            index = self.check_stage(number, stage, index)
        self._check_head()

    def check_restated(self) -> None:
        check_unreplaced(*_RESTATED)
        if SwinTransformerBlock._attn is not _ATTN:
            raise UnsupportedModel(
                "timm's SwinTransformerBlock._attn was replaced for the whole process, and the reduced model would "
                f"bypass the new one; undo that. {SUPPORTED}."
            )

    def check_block(self, index: int, block: nn.Module) -> None:
        check_kind(index, block, (SwinTransformerBlock,))
        check_attention(index, block, (WindowAttention,))
        softmax = block._modules["attn"]._modules["softmax"]  # type: ignore[union-attr]
        if type(softmax) is not nn.Softmax or "_attn" in block.__dict__:
            raise UnsupportedModel(
                f"block {index} has its softmax or its _attn replaced, which would be bypassed; undo that. {SUPPORTED}."
            )
        check_whole(softmax, f"block {index}'s attn.softmax")
        check_rest(index, block)

    def check_stage(self, number: int, stage: nn.Module | None, index: int) -> int:
        """Refuse a stage that is not restated as it is; the index behind its last block."""
        if type(stage) is not SwinTransformerStage:
            raise UnsupportedModel(
                f"stage {number} is a {type(stage).__name__}, whose own steps would be bypassed. {SUPPORTED}."
            )
        merging, blocks = stage._modules["downsample"], stage._modules["blocks"]
        if type(merging) is not (PatchMerging if number else nn.Identity):
            raise UnsupportedModel(
                f"stage {number} begins with a {type(merging).__name__}, of which it is not known how it changes the "
                f"map. {SUPPORTED}."
            )
        check_holder(blocks, nn.Sequential, f"stage {number}")
        assert blocks is not None
        for module, name in ((stage, ""), (blocks, "'s blocks")):
            check_whole(module, f"stage {number}{name}")
        for block in blocks._modules.values():
            assert block is not None
            self.check_block(index, block)
            index += 1
        return index

    def _check_head(self) -> None:
        head = self.model._modules["head"]
        if type(head) is not ClassifierHead or head.use_conv:
            raise UnsupportedModel(f"the head {type(head).__name__} is not supported. {SUPPORTED}.")
        pool = head.global_pool
        check_whole(head, "the model's head")
        check_whole(pool, "the model's head.global_pool")
        if pool.pool_type not in _POOLS:
            raise UnsupportedModel(
                f"global_pool={pool.pool_type!r} is not supported; create the model with one of {', '.join(_POOLS)}"
            )

    @property
    def mean_places(self) -> str | None:
        return "its windows and relative positions are known for whole places alone"

    # --- facts ---

    @property
    def _layers(self) -> list[Any]:
        """The library's stages."""
        return list(self.model.layers)

    def blocks_of(self, stage: Any) -> list[Any]:
        """The blocks of one of the library's stages."""
        return list(stage.blocks)

    def sizes_of(self, stage: Any) -> tuple[Grid, int, int]:
        """Its grid, width and heads."""
        block: Any = self.blocks_of(stage)[0]
        rows, columns = block.input_resolution
        return (rows, columns), block.dim, block.attn.num_heads

    @property
    def class_token(self) -> bool:
        return False

    @property
    def stages(self) -> tuple[Stage, ...]:
        found, first = [], 0
        for stage in self._layers:
            last = first + len(self.blocks_of(stage)) - 1
            found.append(Stage(first, last, *self.sizes_of(stage), 0, has_class_token=False))
            first = last + 1
        return tuple(found)

    @property
    def depth(self) -> int:
        return sum(len(self.blocks_of(stage)) for stage in self._layers)

    @property
    def read_prefix(self) -> int | None:
        return None

    @property
    def head_words(self) -> str:
        return f"global_pool={self.model.head.global_pool.pool_type!r}"

    @property
    def checkpoints(self) -> bool:
        return any(bool(stage.grad_checkpointing) for stage in self._layers)

    @property
    def regroups(self) -> bool:
        return True

    def whole_patches(self, images: Tensor) -> NoReturn:
        raise ReducerError(
            "images cannot be resized for a SwinTransformer, whose windows are made for one size; use the model at "
            "another size: model.set_input_size(…)"
        )

    # --- images and stages ---

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        assert not resized  # whole_patches saw to it
        return on_map(self.model.patch_embed(images))

    def enter_macs(self, block: int, batch: TokenBatch) -> float:
        (rows, columns), merging = batch.tables.grid, self._merging(block)
        return float(-(-rows // 2) * -(-columns // 2) * merging.reduction.weight.numel())

    def enter(self, block: int, batch: TokenBatch, whole: Callable[[], Tensor]) -> TokenBatch:
        """timm's own ``PatchMerging``, of the whole map."""
        if batch.alive is not None:
            raise ReducerError(
                f"tokens under a training mask reach block {block}, where a later stage of this SwinTransformer merges "
                "the whole map and a dropped one would come back with features it has not in inference; train in the "
                "last stage"
            )
        untouched = batch.pos is batch.tables.untouched
        x: Tensor = batch.x if untouched else whole()
        return on_map(self._merging(block)(as_map(x, batch)))

    def parents(self, block: int, batch: TokenBatch) -> Tensor:
        rows, columns = (torch.arange(side, device=batch.x.device) // 2 for side in batch.tables.grid)
        return (rows[:, None] * -(-len(columns) // 2) + columns).flatten()

    def _merging(self, block: int) -> Any:
        first = [stage.first for stage in self.stages].index(block)
        return self._layers[first].downsample

    # --- blocks ---

    def _at(self, index: int) -> Any:
        for stage in self._layers:
            blocks = self.blocks_of(stage)
            if index < len(blocks):
                return blocks[index]
            index -= len(blocks)
        raise IndexError(index)

    def block(self, index: int) -> HostBlock:
        return SwinBlock(self._at(index))

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        if batch.pos is not batch.tables.untouched or not batch.layout.rows:
            return None
        x = as_map(batch.x, batch)
        for index in range(first, last):
            x = self._at(index)(x)
        return replace(batch, x=x.flatten(0, 2))

    # --- the head ---

    def classify(self, batch: TokenBatch) -> Tensor:
        logits: Tensor = self.model.head.fc(self.pooled(batch))
        return logits

    def pooled(self, batch: TokenBatch) -> Tensor:
        head = self.model.head
        x = pool_patches(batch, self.model.norm(batch.x), head.global_pool.pool_type)
        pooled: Tensor = head.drop(x)
        return pooled

    def head_macs(self, layout: Layout) -> Tensor:
        return torch.full(
            (layout.images,), float(self.classifier_macs), dtype=torch.float64, device=layout.lengths.device
        )

    @property
    def classifier_macs(self) -> int:
        head = self.model.head.fc
        return int(head.weight.numel()) if isinstance(head, nn.Linear) else 0

    def behind(self, block: int) -> Iterator[nn.Module]:
        first = 0
        for stage in self._layers:
            if first > block:
                yield stage.downsample
            blocks = self.blocks_of(stage)
            yield from blocks[max(block - first, 0) :]
            first += len(blocks)
        yield self.model.norm
        yield self.model.head


def as_map(x: Tensor, batch: TokenBatch) -> Tensor:
    """All patches of a stage as (B, rows, columns, D)."""
    return x.reshape(batch.layout.images, *batch.tables.grid, x.shape[-1])


def on_map(x: Tensor) -> TokenBatch:
    """(B, rows, columns, D) features as the tokens of a stage."""
    batch = TokenBatch.from_images(x.flatten(1, 2), prefix=0, has_class_token=False, track=True)
    assert batch.pos is not None
    return replace(batch, tables=Map((int(x.shape[1]), int(x.shape[2])), batch.pos))


HOST = TimmSwin
