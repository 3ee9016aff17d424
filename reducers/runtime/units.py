"""Units that hold for one block: the rows go into windows before it, and back into images behind it.

A block whose units are not those of the batch says so by ``HostBlock.grouping``. Within it the batch is one of windows
in every respect: layout, places, budgets, random numbers; a reducer placed there sees nothing else.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from reducers.hosts.protocol import Grouping
from reducers.noise import unit_keys
from reducers.reducer import State
from reducers.tokens import Layout, TokenBatch

_ROWS = tuple(
    each.name
    for each in fields(TokenBatch)
    if each.metadata.get("carried") in ("sum", "heaviest", "log of the sum", "what lives")
)


def into_units(batch: TokenBatch, grouping: Grouping) -> TokenBatch:
    """The tokens of images (none of which has a class token) unit by unit."""
    assert batch.units is None
    units, layout = grouping.units, grouping.layout
    return replace(
        _reordered(batch, grouping.rows),
        layout=layout,
        pos=grouping.pos,
        cls=torch.full_like(layout.lengths, -1),
        biased=None if batch.biased is None else batch.biased[units.sample],
        units=units,
    )


def in_units(state: State, grouping: Grouping) -> State:
    """What reducers may know beyond the signals of such units."""
    keys = None if state.image_keys is None else unit_keys(state.image_keys, grouping.units)
    return replace(state, initial=grouping.patches, grid=grouping.grid, image_keys=keys)


def out_of_units(batch: TokenBatch, entered: TokenBatch, grouping: Grouping) -> TokenBatch:
    """The tokens that are left, image by image in the order of their places; ``entered``: the batch as images."""
    units, layout = grouping.units, batch.layout
    biased = None if batch.biased is None else batch.biased.view(units.samples, units.each).any(1)
    whole: dict[str, Any] = {"units": None, "cls": entered.cls, "biased": biased}
    if layout is grouping.layout:  # every row is still there
        rows = torch.empty_like(grouping.rows).index_copy_(0, grouping.rows, _numbers(grouping.rows))
        same: dict[str, Any] = {
            name: getattr(entered, name) for name in ("layout", "pos", "size", "centroid", "origin")
        }
        return replace(_reordered(batch, rows), **whole, **same)
    assert batch.pos is not None
    unit = layout.row_image
    place = units.places[units.number[unit], batch.pos]
    rows = (units.sample[unit] * units.places.numel() + place).sort(stable=True).indices
    counts = [sum(layout.counts[first : first + units.each]) for first in range(0, layout.images, units.each)]
    return replace(_reordered(batch, rows), **whole, layout=Layout.listed(counts, rows.device), pos=place[rows])


def _reordered(batch: TokenBatch, rows: Tensor) -> TokenBatch:
    """The same tokens in another order: new row i is old row ``rows[i]``."""
    moved: dict[str, Any] = {
        name: value.index_select(0, rows) for name in _ROWS if (value := getattr(batch, name)) is not None
    }
    if batch.origin is not None and len(rows):
        where = torch.empty_like(rows).index_copy_(0, rows, _numbers(rows))
        moved["origin"] = where[batch.origin.clamp(min=0)].masked_fill(batch.origin < 0, -1)
    return replace(batch, x=batch.x.index_select(0, rows), **moved)


def _numbers(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)
