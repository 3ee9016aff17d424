"""Attention of tokens over cells: keys and values are convolved from the grid of patches, on which tokens may be gone.

Knows no library. Tokens keep the place they come from (``TokenBatch.pos``). Before each convolution they are put on the
grid again, and ``fill`` says what stands where no token is any more:

=====  ===========================================================================================================
last   the features that the place's own token had when it came to the block in which it went
zero   zeros; keys and values of cells that see no token are left out
owner  the token that carries the place now; a method that drops is refused, for there is nothing to show
=====  ===========================================================================================================

A token without a place (the class token, EViT's fused one) stays off the grid: its query, key and value are those of
its own features. A cell's attention is shared out equally to the tokens that it sees (``spread="mass"``), or to those
in its own square of the grid (``"nearest"``); what a cell gets that sees none is nobody's. All of this is ours: no
source says what becomes of the holes, or how attention to cells scores tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reducers.errors import ReducerError
from reducers.hosts.protocol import Grid, Spread
from reducers.lazy import cached_property
from reducers.tokens import Layout, TokenBatch

FILLS = ("last", "zero", "owner")
SPREADS = ("mass", "nearest")


@dataclass(frozen=True)
class Window:
    """What one cell is convolved from, along either side of the grid."""

    kernel: int
    stride: int
    padding: int

    def cells(self, grid: Grid) -> Grid:
        """Rows and columns of cells over a grid of patches."""
        rows, columns = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in grid)
        return rows, columns

    def field(self, grid: Grid, spread: str, device: torch.device) -> Field:
        """Which places belong to which cell, as its attention is shared out."""
        return Field(*(torch.tensor(listed, device=device) for listed in _listed(self, grid, spread == "nearest")))


@dataclass(frozen=True, eq=False)
class Field:
    """Places and cells that belong together, as lists of one length; N and C stand for none."""

    cells_of: Tensor  # (N, S) int64
    places_of: Tensor  # (C, P) int64


Lists = list[list[int]]


@lru_cache(maxsize=64)
def _listed(window: Window, grid: Grid, nearest: bool) -> tuple[Lists, Lists]:
    cells = window.cells(grid)
    down, across = (_owners(window, *sides, nearest) for sides in zip(grid, cells, strict=True))
    cells_of = [[a * cells[1] + b for a in rows for b in columns] for rows in down for columns in across]
    places_of: Lists = [[] for _ in range(cells[0] * cells[1])]
    for place, those in enumerate(cells_of):
        for cell in those:
            places_of[cell].append(place)
    return _even(cells_of, len(places_of)), _even(places_of, len(cells_of))


def _owners(window: Window, places: int, cells: int, nearest: bool) -> Lists:
    """Along one side, the cells that each place belongs to."""
    if nearest:
        return [[min(place // window.stride, cells - 1)] for place in range(places)]
    first = [cell * window.stride - window.padding for cell in range(cells)]
    return [[c for c in range(cells) if first[c] <= place < first[c] + window.kernel] for place in range(places)]


def _even(lists: Lists, none: int) -> Lists:
    """All as long as the longest."""
    longest = max(map(len, lists), default=0)
    return [[*each, *[none] * (longest - len(each))] for each in lists]


@dataclass(frozen=True, eq=False)
class Canvas:
    """What a pass knows of its grid: ``TokenBatch.tables``."""

    grid: Grid
    untouched: Tensor  # (T,) the places of tokens as they were embedded: while a batch has these, all are in order
    left: Tensor | None = None  # (B, N, D) what each place shows, or last showed, to the block that tokens come to
    # of images made smaller: the place of each patch of the images as given (N0,), and the patch of each place (N,)
    given: tuple[Tensor, Tensor] | None = None
    _found: list[Any] = field(default_factory=list)  # the places of the latest batch, which several steps ask for
    _fields: dict[tuple[Window, str], Field] = field(default_factory=dict)

    def relocated(self, original: Tensor, patches: int) -> Canvas:
        """As ``Host.relocated``."""
        places = torch.full((patches,), -1, dtype=torch.int64, device=original.device)
        places[original] = torch.arange(len(original), device=original.device)
        return replace(self, given=(places, original))

    def field(self, window: Window, spread: str) -> Field:
        """As ``Window.field``, once a pass."""
        if (window, spread) not in self._fields:
            self._fields[window, spread] = window.field(self.grid, spread, self.untouched.device)
        return self._fields[window, spread]

    def places(self, batch: TokenBatch) -> Places:
        """Where a batch's tokens are."""
        if not self._found or self._found[0] is not batch.pos:
            self._found[:] = [batch.pos, Places(batch, self)]
        found: Places = self._found[1]
        return found


class Places:
    """Where tokens are on the grid, and which are off it."""

    def __init__(self, batch: TokenBatch, canvas: Canvas) -> None:
        assert batch.pos is not None
        self.layout, self.count = batch.layout, canvas.grid[0] * canvas.grid[1]
        self.whole = batch.pos is canvas.untouched  # every place has its token, in order behind the prefix
        self.pos = batch.pos
        if canvas.given is not None:
            self.pos = canvas.given[0][batch.pos.clamp(min=0)].where(batch.pos >= 0, batch.pos)

    @cached_property
    def spot(self) -> Tensor:
        """(T,) the place among those of all images, and behind the last one for tokens that have none."""
        return (self.layout.row_image * self.count + self.pos).where(self.pos >= 0, self.layout.images * self.count)

    @cached_property
    def row_at(self) -> Tensor:
        """(B, N) the packed row of the token at each place, -1 where there is none."""
        layout = self.layout
        rows = torch.arange(layout.rows, device=self.pos.device)
        found = torch.full((layout.images * self.count + 1,), -1, dtype=torch.int64, device=self.pos.device)
        return found.scatter(0, self.spot, rows)[:-1].view(layout.images, self.count)

    @cached_property
    def off(self) -> Layout:
        """The tokens that have no place, as a layout of their own."""
        layout = self.layout
        if self.whole and layout.uniform is not None:
            lead = layout.uniform[1]
            return Layout.alike(layout.images, lead, lead, layout.lengths.device)
        if torch.compiler.is_exporting():
            raise ReducerError(
                "which tokens have a place on the grid is read from the images once some are gone, and a graph that is "
                "exported has fixed sizes; run this model in PyTorch"
            )
        counts = layout.sum_rows((self.pos < 0).long())
        found = Layout.ragged(counts, counts)
        if found.uniform is None and len(set(found.counts)) == 1:
            return Layout.alike(layout.images, found.counts[0], found.counts[0], counts.device)
        return found

    @cached_property
    def off_rows(self) -> Tensor:
        """(To,) their packed rows."""
        if self.whole and self.layout.uniform is not None:
            prefix = torch.arange(self.layout.uniform[1], device=self.pos.device)
            return (self.layout.starts[:, None] + prefix).flatten()
        return (self.pos < 0).nonzero_static(size=self.off.rows).squeeze(1)

    def owners(self, batch: TokenBatch, canvas: Canvas) -> Tensor:
        """(B, N) the packed row of the token that carries each place.

        Raises:
            ReducerError: a place's token was dropped, or may be, under a training mask.
        """
        assert batch.origin is not None
        rows = batch.origin
        if canvas.given is not None and rows.shape[1] != len(canvas.given[1]):
            rows = rows[:, canvas.given[1]]
        if batch.alive is not None or bool((rows < 0).any()):
            raise ReducerError(
                "tokens were dropped, so fill='owner' has nothing to show in their places; use a method that merges, "
                "or host={'fill': 'last'} (the features they had) or 'zero'"
            )
        return rows


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of a batch: of each image first its tokens off the grid, then its cells, or those that see a token."""

    off: Layout
    cells: int
    live: Tensor | None  # (B, C) bool; None: all

    @cached_property
    def layout(self) -> Layout:
        """Where they lie."""
        off, cells = self.off, self.cells
        if self.live is not None:
            return Layout.ragged(off.lengths + self.live.sum(1), off.lengths)
        if off.uniform is not None:
            return Layout.alike(off.images, off.uniform[0] + cells, off.uniform[0], off.lengths.device)
        counts = off.counts
        rows = off.rows + cells * off.images
        return Layout(off.lengths + cells, off.lengths, rows, None, ([count + cells for count in counts], counts))

    @cached_property
    def _chosen(self) -> Tensor | None:
        """(K,) their places in the padded view of all, (B, Lo + C); None: every one."""
        if self.live is None and self.off.uniform is not None:
            return None
        live = self.off.valid.new_ones(self.off.images, self.cells) if self.live is None else self.live
        valid = torch.cat([self.off.valid, live], dim=1)
        return valid.flatten().nonzero_static(size=self.layout.rows).squeeze(1)

    def joined(self, off: Tensor, cells: Tensor) -> Tensor:
        """(K, ...) of values of the tokens off the grid (To, ...) and of all cells (B, C, ...)."""
        every = torch.cat([self.off.pad(off), cells], dim=1).flatten(0, 1)
        return every if self._chosen is None else every.index_select(0, self._chosen)

    def parted(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The opposite; 0 for cells that are none of the keys."""
        images, wide = self.off.images, self.off.longest + self.cells
        if self._chosen is not None:
            keys = keys.new_zeros(images * wide, *keys.shape[1:]).index_copy(0, self._chosen, keys)
        every = keys.view(images, wide, *keys.shape[1:])
        return self.off.unpad(every[:, : self.off.longest]), every[:, self.off.longest :]


class Cells:
    """A batch on the grid of one block: what its convolutions read, and what attention over cells says of tokens."""

    def __init__(self, batch: TokenBatch, window: Window, *, fill: str, spread: str) -> None:
        canvas = batch.tables
        assert isinstance(canvas, Canvas)
        self.batch, self.canvas, self.window, self.fill, self.spread = batch, canvas, window, fill, spread
        self.places = canvas.places(batch)

    @property
    def images(self) -> int:
        return self.batch.layout.images

    @cached_property
    def count(self) -> int:
        """C, cells of an image."""
        rows, columns = self.window.cells(self.canvas.grid)
        return rows * columns

    @cached_property
    def rows(self) -> Tensor:
        """(B, N) the packed row of the token that each place shows, -1 where it shows none."""
        if self.fill == "owner" and not self.places.whole:
            return self.places.owners(self.batch, self.canvas)
        return self.places.row_at

    @cached_property
    def weight(self) -> Tensor:
        """(B, N) float32 how far each place's token is there: 1 or 0, or under a training mask what is left of it."""
        there = (self.rows >= 0).float()
        return there if self.batch.alive is None else there * self._at_places(self.batch.alive)

    def _at_places(self, values: Tensor) -> Tensor:
        """Tokens (T, ...) -> (B, N, ...); anything where no token is."""
        if not self.batch.layout.rows:
            return values.new_zeros(*self.rows.shape, *values.shape[1:])
        return values[self.rows.clamp(min=0)]

    def shown(self) -> Tensor:
        """(B, N, D) the features of ``fill="last"``: of each place's token, or those that it left."""
        batch, left = self.batch, self.canvas.left
        if self.places.whole and batch.alive is None:
            return batch.layout.pad_patches(batch.x)
        own = self._at_places(batch.x)
        if left is None:  # as they were embedded, in places told by other numbers
            return own
        if batch.alive is not None:
            weight = self.weight[..., None].to(own.dtype)
            own = weight * own + (1 - weight) * left.to(own.dtype)
        return own.where((self.rows >= 0)[..., None], left.to(own.dtype))

    def map(self, normed: Tensor, norm: Any) -> Tensor:
        """(B, D, rows, columns) what is convolved: normed features (T, D) on the grid. ``norm``: of what was left."""
        if self.places.whole and self.batch.alive is None:
            found = self.batch.layout.pad_patches(normed)
        elif self.fill == "last":
            found = norm(self.shown())
            if self.batch.alive is None:  # the very values of the tokens that are there
                found = self._at_places(normed).where((self.rows >= 0)[..., None], found.to(normed.dtype))
        elif self.fill == "owner":
            found = self._at_places(normed)
        else:
            found = self._at_places(normed) * self.weight[..., None].to(normed.dtype)
        return found.transpose(1, 2).unflatten(2, self.canvas.grid)

    def to_queries(self, convolved: Tensor, normed: Tensor) -> Tensor:
        """(T, D) what queries are made of: convolved (B, N, D) at the tokens' places, off the grid normed (T, D)."""
        places = self.places
        if places.whole:
            prefix = self.batch.layout.pad(normed)[:, : places.off.longest]
            return torch.cat([prefix.to(convolved.dtype), convolved], dim=1).flatten(0, 1)
        return self._at_tokens(convolved, normed.index_select(0, places.off_rows))

    def _at_tokens(self, at_places: Tensor, off: Tensor) -> Tensor:
        """From places (B, N, ...), and values of the tokens off the grid (To, ...), to tokens (T, ...)."""
        spot = self.places.spot.clamp(max=max(self.images * self.places.count - 1, 0))
        found = at_places.flatten(0, 1).index_select(0, spot)
        return found.index_copy(0, self.places.off_rows, off.to(found.dtype))

    @cached_property
    def live(self) -> Tensor | None:
        """(B, C) bool: cells that are keys; None: all."""
        layout = self.batch.layout
        finished = min(layout.counts, default=1) == 0  # an image without tokens asks for no key
        if not finished and (self.fill != "zero" or self.places.whole):
            return None
        live = (layout.lengths > 0)[:, None].expand(-1, self.count)
        return live & self._of_cells((self.rows >= 0).float()).bool() if self.fill == "zero" else live

    def _of_cells(self, at_places: Tensor) -> Tensor:
        """(B, C) the largest of the values (B, N), 0 or more, in what each cell is convolved from."""
        places_of = self.canvas.field(self.window, "mass").places_of
        return torch.nn.functional.pad(at_places, (0, 1))[:, places_of].amax(-1)

    @cached_property
    def keys(self) -> Keys:
        return Keys(self.places.off, self.count, self.live)

    def seen(self, alive: Tensor) -> Tensor | None:
        """As ``Core.seen``."""
        if self.fill != "zero" and self.places.off.rows == int(self.batch.layout.prefix.sum()):
            return None  # what a mask drops is shown as it was, and prefix tokens are never masked
        off = alive.index_select(0, self.places.off_rows)
        cells = self._of_cells(self.weight) if self.fill == "zero" else self.weight.new_ones(self.images, self.count)
        return self.keys.joined(off, cells.to(off.dtype))

    def biases(self, by_token: Tensor) -> Tensor:
        """As ``Core.biases``: a cell is a part of the image, whatever token it is made of."""
        off = by_token.index_select(0, self.places.off_rows)
        return self.keys.joined(off, off.new_zeros(self.images, self.count))

    def to_tokens(self, keys: Tensor, how: Spread) -> Tensor:
        """As ``Core.to_tokens``."""
        field = self.canvas.field(self.window, self.spread)
        off, cells = self.keys.parted(keys)
        ends = [1] * (cells.dim() - 2)
        if how == "share":
            weight = self.weight.to(cells.dtype)
            among = torch.nn.functional.pad(weight, (0, 1))[:, field.places_of].sum(-1)  # (B, C)
            cells = cells / among.where(among > 0, torch.inf).view(*among.shape, *ends)
        none = cells.new_zeros(self.images, 1, *cells.shape[2:])
        at_places = torch.cat([cells, none], dim=1)[:, field.cells_of].sum(2)  # (B, N, ...)
        counted = (field.cells_of < self.count).sum(1).to(cells.dtype)  # (N,) cells of each place
        if self.fill == "owner" and not self.places.whole:
            return self._to_owners(at_places, off, how, counted)
        if how == "share":
            at_places = at_places * weight.view(*weight.shape, *ends)
        else:
            at_places = at_places / counted.view(-1, *ends)
        return self._at_tokens(at_places, off)

    def _to_owners(self, at_places: Tensor, off: Tensor, how: Spread, counted: Tensor) -> Tensor:
        """Of all places that show a token the sum, or the mean over all their cells."""
        rows, of = self.rows.flatten(), self.batch.layout.rows
        found = at_places.new_zeros(of, *at_places.shape[2:]).index_add(0, rows, at_places.flatten(0, 1))
        off_rows = self.places.off_rows
        if how == "share":  # a token off the grid may be shown on it, and has a key of its own beside
            return found.index_add(0, off_rows, off.to(found.dtype))
        cells = at_places.new_zeros(of).index_add(0, rows, counted.repeat(self.images))
        found = found / cells.clamp(min=1).view(-1, *[1] * (found.dim() - 1))
        return found.index_copy(0, off_rows, off.to(found.dtype))
