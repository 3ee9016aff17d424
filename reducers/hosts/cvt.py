"""CvT: the stage with the class token, whose keys and values are cells convolved from the grid of patches.

What its two implementations have in common, and the one of ``reducers.backbones.cvt``, as the authors wrote it;
transformers' is in ``reducers.hosts.hf_cvt``. The stages before are a part of the embedding and run by their own code;
what stands in the holes of the grid, and how cells score tokens, is told in ``reducers.hosts.cells``.

In training mode BatchNorm goes by the batch, holes as they are filled, and moves its statistics as it does in the plain
model; keep those layers in eval mode where an image must not depend on its neighbours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reducers.cost import BlockCost
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts.cells import FILLS, SPREADS, Canvas, Cells, Window
from reducers.hosts.pools import class_or_mean
from reducers.hosts.protocol import Core, Family, Grid, Host, PreNormBlock, Spread, Stage, StochasticDepth
from reducers.hosts.riding import riding
from reducers.reducer import TokenReducer
from reducers.tokens import Layout, TokenBatch

_OWN = "reducers.backbones.cvt."
_ROWWISE = ("Linear", "QuickGELU", "GELU", "Dropout", "Identity")


class CvtCore(Core):
    """Queries of tokens, keys and values of cells."""

    own_key: ClassVar[bool] = False

    def __init__(self, block: CvtBlock, normed: Tensor, batch: TokenBatch) -> None:
        self.block = block
        self.cells = block.on_grid(batch)
        grid = self.cells.map(normed, block.norm(0))
        query, key, value = (block.convolved(part, grid) for part in range(3))  # (B, N or C, D)
        super().__init__(self.cells.to_queries(query, normed), batch.layout)
        off = normed.index_select(0, self.cells.places.off_rows).to(key.dtype)
        self.parts = self.cells.keys.joined(off, key), self.cells.keys.joined(off, value)

    @property
    def scale(self) -> float:
        return float(self.block.attn.scale)

    @property
    def dropout(self) -> float:
        return self.block.dropout

    @property
    def keys_layout(self) -> Layout:
        return self.cells.keys.layout

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """x are rows of what queries are made of, convolved already."""
        linears, heads = self.block.linears, self.block.heads
        return tuple(
            linears[part](x if part == 0 else self.parts[part - 1]).unflatten(1, (heads, -1))
            for part in range(first, last)
        )

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        return self.block.projected(summed)

    def to_tokens(self, cells: Tensor, how: Spread) -> Tensor:
        return self.cells.to_tokens(cells, how)

    def biases(self, by_token: Tensor) -> Tensor:
        return self.cells.biases(by_token)

    def seen(self, alive: Tensor) -> Tensor | None:
        return self.cells.seen(alive)


class CvtBlock(PreNormBlock):
    """A block of either implementation; ``chosen``: the options of the host."""

    keys_are_tokens: ClassVar[bool] = False
    trusted: ClassVar[tuple[str, ...]] = ("torch.nn.modules.", "transformers.models.", "reducers.backbones.")

    def __init__(self, module: Any, chosen: Mapping[str, str]) -> None:
        super().__init__(module)
        self.fill, self.spread = chosen["fill"], chosen["spread"]

    # --- what the implementations name differently ---

    @property
    @abstractmethod
    def attn(self) -> Any:
        """The module that has the scale."""

    @property
    @abstractmethod
    def heads(self) -> int: ...

    @property
    @abstractmethod
    def dropout(self) -> float:
        """The share of attention weights that is dropped now."""

    @property
    @abstractmethod
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Of query, key and value, behind the convolutions."""

    @property
    @abstractmethod
    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        """The depthwise ones of query, key and value."""

    @property
    @abstractmethod
    def output(self) -> nn.Linear:
        """The last layer of the attention."""

    @abstractmethod
    def convolved(self, part: int, grid: Tensor) -> Tensor:
        """Convolution and norm of query 0, key 1 or value 2: (B, D, rows, columns) -> (B, places or cells, D)."""

    @abstractmethod
    def projected(self, summed: Tensor) -> Tensor:
        """From the values summed (T, D) to what the attention adds."""

    # --- what they have in common ---

    @property
    def window(self) -> Window:
        """What a cell is convolved from."""
        key = self.convolutions[1]
        return Window(side_of(key.kernel_size), side_of(key.stride), side_of(key.padding))

    def on_grid(self, batch: TokenBatch) -> Cells:
        """A batch on the grid, and its cells."""
        return Cells(batch, self.window, fill=self.fill, spread=self.spread)

    @property
    def cost(self) -> BlockCost:
        query, key, value = (linear.weight.numel() for linear in self.linears)
        mlp = sum(layer.weight.numel() for layer in self.mlp.modules() if isinstance(layer, nn.Linear))
        return BlockCost(query, key + value, self.linears[0].out_features, self.output.weight.numel(), mlp)

    def convolution_macs(self, grid: Grid) -> int:
        """Of the three convolutions over the whole grid of an image."""
        cells = prod(self.window.cells(grid))
        query, key, value = (part.weight.numel() for part in self.convolutions)
        return prod(grid) * query + cells * (key + value)

    def fixed_macs(self, batch: TokenBatch) -> Tensor:
        return (batch.layout.lengths > 0).double() * self.convolution_macs(batch.tables.grid)

    def key_counts(self, batch: TokenBatch) -> Tensor:
        return self.on_grid(batch).keys.layout.lengths

    def published_keys(self, batch: TokenBatch) -> Tensor:
        """All cells."""
        cells = self.on_grid(batch)
        return (cells.places.off.lengths + cells.count).where(batch.layout.lengths > 0, 0)

    def arrive(self, batch: TokenBatch) -> TokenBatch:
        """What a place shows from here on, should its token go in this block."""
        if self.fill != "last":
            return batch
        return replace(batch, tables=replace(batch.tables, left=self.on_grid(batch).shown()))

    def attention(self, x: Tensor, batch: TokenBatch) -> CvtCore:
        return CvtCore(self, x, batch)


class OwnCvtBlock(CvtBlock):
    """The authors' block."""

    module: Any

    @property
    def attn(self) -> Any:
        return self.module.attn

    @property
    def heads(self) -> int:
        return int(self.attn.heads)

    @property
    def dropout(self) -> float:
        return 0.0

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.attn.proj_q, self.attn.proj_k, self.attn.proj_v

    @property
    def _projections(self) -> tuple[Any, Any, Any]:
        return self.attn.conv_proj_q, self.attn.conv_proj_k, self.attn.conv_proj_v

    @property
    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        query, key, value = (part.conv for part in self._projections)
        return query, key, value

    @property
    def output(self) -> nn.Linear:
        linear: nn.Linear = self.attn.proj
        return linear

    def convolved(self, part: int, grid: Tensor) -> Tensor:
        found: Tensor = self._projections[part](grid)
        return found.flatten(2).transpose(1, 2)

    def projected(self, summed: Tensor) -> Tensor:
        added: Tensor = self.attn.proj(summed)
        return added

    def attention_ends(self) -> tuple[nn.Module, ...]:
        return (self.attn.proj,)

    def norm(self, branch: int) -> nn.Module:
        norm: nn.Module = self.module.norm2 if branch else self.module.norm1
        return norm

    def depth(self, branch: int) -> StochasticDepth | None:
        path = self.module.drop_path
        if not path.training or not path.drop_prob:
            return None
        return StochasticDepth(path.drop_prob, path.scale_by_keep)

    @property
    def mlp(self) -> nn.Module:
        mlp: nn.Module = self.module.mlp
        return mlp


class Cvt(Host):
    """What both implementations have in common."""

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"fill": FILLS, "spread": SPREADS}
    read_prefix: ClassVar[int] = 1
    embedded_as: ClassVar[str] = "the tokens of their stages feed a convolution"
    block_of: ClassVar[type[CvtBlock]]

    # --- what the implementations name differently ---

    @abstractmethod
    def parts(self) -> list[Any]:
        """The stages as modules."""

    @abstractmethod
    def layers(self, stage: Any) -> Any:
        """The blocks of a stage."""

    @abstractmethod
    def convolution(self, stage: Any) -> nn.Conv2d:
        """The one that embeds its patches."""

    @abstractmethod
    def embedding(self, stage: Any) -> nn.Module:
        """(B, C, H, W) -> (B, D, rows, columns)."""

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """What makes logits of the normed class token."""

    # --- facts ---

    @property
    def stages(self) -> tuple[Stage, ...]:
        found: list[Stage] = []
        first, grid = 0, self.image_size
        parts = self.parts()
        for part in parts:
            grid, blocks, last = patches_of(self.convolution(part), grid), len(self.layers(part)), part is parts[-1]
            heads = self.block_of(self.layers(part)[0], self.chosen).heads
            width = self.convolution(part).out_channels
            found.append(Stage(first, first + blocks - 1, grid, width, heads, int(last), last))
            first += blocks
        return tuple(found)

    @property
    def embedded(self) -> int:
        return sum(len(self.layers(part)) for part in self.parts()[:-1])

    @property
    def depth(self) -> int:
        return sum(len(self.layers(part)) for part in self.parts())

    @property
    def classes(self) -> int:
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    @property
    def channels(self) -> int:
        return int(self.convolution(self.parts()[0]).in_channels)

    def unfit(self, reducer: TokenReducer) -> str | None:
        """Mixtures are at no place of the grid, and keys are no tokens."""
        if reducer.traits.pools:
            return (
                "its convolutions read tokens in their places, and what this method makes of all tokens together is at "
                "none; use a method that selects or merges"
            )
        if reducer.traits.needs_token_keys:
            return (
                "its tokens attend to cells of a coarser grid, and this method traces or replaces attention from token "
                "to token; use a method that scores tokens"
            )
        return None

    # --- images ---

    def _grids(self, images: Tensor) -> list[Grid]:
        """Rows and columns of patches of each stage."""
        found, grid = [], (int(images.shape[-2]), int(images.shape[-1]))
        for part in self.parts():
            found.append(grid := patches_of(self.convolution(part), grid))
        return found

    def grid_of(self, images: Tensor) -> Grid:
        return self._grids(images)[-1]

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        side = prod(side_of(self.convolution(part).stride) for part in self.parts())
        return self.grid_of(images), (side, side)

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ReducerError(f"the model reads images (B, {self.channels}, H, W); got {tuple(images.shape)}")
        *before, last = self.parts()
        x = images.to(self.convolution(self.parts()[0]).weight.dtype)
        for part in before:
            x, _ = part(x)
        x = self.embedding(last)(x)
        rows, columns = (int(side) for side in x.shape[2:])
        tokens = torch.cat([last.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        batch = TokenBatch.from_images(tokens, prefix=1, has_class_token=True, track=True)
        assert batch.pos is not None
        batch = replace(batch, tables=Canvas((rows, columns), batch.pos))
        return batch.with_origin() if self.chosen["fill"] == "owner" else batch

    def relocated(self, tables: Canvas, original: Tensor, patches: int) -> Canvas:
        return tables.relocated(original, patches)

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        total, parts = 0, self.parts()
        for part, grid in zip(parts, self._grids(images), strict=True):
            total += prod(grid) * self.convolution(part).weight.numel()
            for layer in self.layers(part) if part is not parts[-1] else ():
                block = self.block_of(layer, self.chosen)
                tokens = torch.tensor(prod(grid), device="cpu")
                cells = torch.tensor(prod(block.window.cells(grid)), device="cpu")
                total += block.convolution_macs(grid)
                total += int(block.cost.macs(queries=tokens, keys=cells, outputs=tokens, mlp=tokens))
        return total

    # --- blocks ---

    def block(self, index: int) -> CvtBlock:
        return self.block_of(self.layers(self.parts()[-1])[index - self.embedded], self.chosen)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout, canvas = batch.layout, batch.tables
        if not canvas.places(batch).whole:
            return None
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for layer in list(self.layers(self.parts()[-1]))[first - self.embedded : last - self.embedded]:
            x = layer(x, *canvas.grid)
        return replace(batch, x=x.flatten(0, 1))

    # --- the head ---

    def pooled(self, batch: TokenBatch) -> Tensor:
        """(B, D) the normed class token; where an experiment let it be dropped, the mean of what is left."""
        return class_or_mean(batch, self.final_norm(batch.x), 1)

    def classify(self, batch: TokenBatch) -> Tensor:
        pooled = self.pooled(batch)
        return pooled if self.head is None else self.head(pooled)

    @property
    def classifier_macs(self) -> int:
        return self.head.weight.numel() if isinstance(self.head, nn.Linear) else 0

    def behind(self, block: int) -> Iterator[nn.Module]:
        yield from list(self.layers(self.parts()[-1]))[block - self.embedded :]
        yield self.final_norm
        if self.head is not None:
            yield self.head


class OwnCvt(Cvt):
    """``reducers.backbones.cvt``."""

    library: ClassVar[str] = "reducers.backbones"
    families: ClassVar[tuple[Family, ...]] = (
        Family("cvt", "CvT as its authors wrote it", travels="its place on the grid of patches"),
    )
    block_of: ClassVar[type[CvtBlock]] = OwnCvtBlock

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        return ["cvt_13", "cvt_21"]

    def check(self) -> None:
        check_unreplaced(self.model, type(self.model).__name__)
        last = len(self.parts()) - 1
        for index, stage in enumerate(self.parts()):
            check_stage(stage, index, last=index == last, has_class_token=stage.cls_token is not None)
            check_type(stage, _OWN + "Stage", f"stage {index}")
            for number, block in enumerate(stage.blocks):
                where = f"block {number} of stage {index}"
                check_type(block, _OWN + "Block", where)
                check_type(block.attn, _OWN + "Attention", f"the attention of {where}")
                check_type(block.mlp, "torch.nn.modules.container.Sequential", f"the MLP of {where}")
                if any(type(part).__name__ not in _ROWWISE for part in block.mlp):
                    raise UnsupportedModel(
                        f"the MLP of {where} is not known to act token by token; put the plain layers back"
                    )
                if index == last:
                    for restated in (block, block.attn, block.drop_path):
                        check_unreplaced(restated, where)
                    check_type(block.drop_path, "timm.layers.drop.DropPath", f"the drop_path of {where}")
                    check_convolutions(OwnCvtBlock(block, self.chosen), where)

    def parts(self) -> list[Any]:
        return list(self.model.stages)

    def layers(self, stage: Any) -> Any:
        return stage.blocks

    def convolution(self, stage: Any) -> nn.Conv2d:
        found: nn.Conv2d = stage.patch_embed.proj
        return found

    def embedding(self, stage: Any) -> nn.Module:
        found: nn.Module = stage.patch_embed
        return found

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.model.norm
        return norm

    @property
    def head(self) -> nn.Module | None:
        head: nn.Module = self.model.head
        return head

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.model.image_size
        return int(height), int(width)


HOST = OwnCvt


def side_of(sides: tuple[int, ...] | int | str) -> int:
    """Of a square, one side."""
    assert isinstance(sides, (tuple, int))
    return sides if isinstance(sides, int) else int(sides[0])


def patches_of(convolution: nn.Conv2d, size: Grid) -> Grid:
    """Rows and columns that a convolution makes of so many."""
    window = Window(side_of(convolution.kernel_size), side_of(convolution.stride), side_of(convolution.padding))
    return window.cells(size)


# --- whether a model can be driven ------------------------------------------------------------------------------------


def check_type(module: nn.Module | None, expected: str, where: str) -> None:
    found = "nothing" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
    if found != expected:
        raise UnsupportedModel(
            f"{where} is a {found.rpartition('.')[2]}, not {expected.rpartition('.')[2]}, and steps of its own would "
            "be bypassed; put the plain one back, and wrap, shard or compile the reduced model instead"
        )


def check_unreplaced(module: nn.Module, where: str) -> None:
    """Refuse what rides on a module that is restated and not called."""
    kind = riding(module, "transformers.utils.output_capturing")
    if kind is not None:
        raise UnsupportedModel(
            f"{where} has a {'forward of its own' if kind == 'forward' else kind}, which would be bypassed; remove it, "
            "or hook a part that is called (norms, convolutions, projections, the stages before), or the reduced model"
        )


def check_stage(stage: nn.Module, index: int, *, last: bool, has_class_token: bool) -> None:
    if last:
        check_unreplaced(stage, f"stage {index}")
    if last and not has_class_token:
        raise UnsupportedModel(
            f"stage {index}, the last one, has no class token (cls_token); a CvT is reduced in the stage with one"
        )


def check_convolutions(block: CvtBlock, where: str) -> None:
    """Refuse a grid that cells do not lie on as they are told to."""
    query, key, value = block.convolutions
    for part, convolution in (("query", query), ("key", key), ("value", value)):
        square = all(len({*sides}) == 1 for sides in (convolution.kernel_size, convolution.stride))
        plain = convolution.padding_mode == "zeros" and side_of(convolution.dilation) == 1 and convolution.groups > 1
        if type(convolution).__qualname__ != "Conv2d" or not square or not plain:
            raise UnsupportedModel(
                f"the {part} of {where} is not convolved by a square depthwise nn.Conv2d over zeros; put the plain one "
                "back"
            )
    kept = side_of(query.stride) == 1 and side_of(query.kernel_size) == 2 * side_of(query.padding) + 1
    if not kept:
        raise UnsupportedModel(
            f"the query's convolution of {where} has kernel {query.kernel_size}, stride {query.stride} and padding "
            f"{query.padding}, which does not give a query for each token; a reduced CvT needs one"
        )
    if (key.kernel_size, key.stride, key.padding) != (value.kernel_size, value.stride, value.padding):
        raise UnsupportedModel(f"keys and values of {where} lie on different grids; a reduced CvT needs them on one")
