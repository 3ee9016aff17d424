"""What a decision counts, where the units of a sample are decided on together: a clip's frames.

A reducer decides on units, one by one. Here it is shown others in their place, and what it decides is carried back:

* **together**: one unit of all tokens of a sample, prefix tokens first. A budget counts the tokens of the clip, and a
  frame in which little is going on may lose all of its patches. What the class token's copies attend to counts by the
  share of their frame, so that it adds up to one over the clip. A token that stands for several lies where the heaviest
  of them lies, in its frame.
  A reducer that decides on whole clips (``Traits.whole_clip``) is shown this wherever frames are units.
* **alike**: one unit of the places of a frame, with the mean of what all frames signal of each. Frames then keep the
  same places, or merge the same, each its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.maps import Keep, Mask, Merge, TokenMap
from reducers.signals import Signals
from reducers.tokens import Layout, TokenBatch, Units


def over(signals: Signals, batch: TokenBatch, *, whole: bool = False) -> OverUnits | None:
    """The signals as reducers are shown them; None: as they are. ``whole``: to reducers that decide on whole clips."""
    units = batch.units
    if units is None or (units.decided == "each" and not whole):
        return None
    return (Alike if units.decided == "alike" else Together)(signals, units)


class OverUnits(Signals):
    """Signals of other units, made of those of the batch's own."""

    word = ""  # how they are decided on

    def __init__(self, own: Signals, units: Units, layout: Layout, size: Tensor) -> None:
        super().__init__(layout, size, layout.starts, own._spend)
        self.own, self.units = own, units

    @classmethod
    def layout_of(cls, inner: Layout, units: Units) -> Layout:
        """The layout that reducers are shown, the same one as long as the batch has the same."""
        if not units.shown or units.shown[0] is not inner:
            units.shown[:] = inner, cls._layout(inner, units)
        return units.shown[1]

    @classmethod
    def _layout(cls, inner: Layout, units: Units) -> Layout:
        raise NotImplementedError

    def told(self, values: Tensor) -> Tensor:
        """What is told of each token of the batch, of each one shown."""
        raise NotImplementedError

    def keys(self) -> Tensor:
        return self.told(self.own.keys())

    def values(self) -> Tensor:
        return self.told(self.own.values())

    def output(self) -> Tensor:
        return self.told(self.own.output())

    def previous_attention(self) -> Tensor:
        return self.told(self.own.previous_attention())

    def attend_with(self, attention: Tensor) -> None:
        raise ReducerError(
            f"the map that a block attends with is of frames, and this model's are decided on {self.word}; use another "
            "method, or {'over': 'frame'}"
        )

    def back(self, decisions: Sequence[Decision], names: Sequence[str]) -> list[Decision]:
        """The decisions of some reducers, one on what the other left, as decisions on the units of the batch."""
        raise NotImplementedError


class Together(OverUnits):
    """All units of a sample as one."""

    word = "together"

    def __init__(self, own: Signals, units: Units) -> None:
        inner = own.layout
        sample = units.sample[inner.row_image]
        self._rows = (sample * 2 + (~inner.is_prefix).long()).sort(stable=True).indices
        super().__init__(own, units, self.layout_of(inner, units), own.size[self._rows])
        if inner.lead is None:  # the first frame of a clip may have no class token
            self.cls = self.cls.masked_fill(own.cls.view(units.samples, units.each)[:, 0] < 0, -1)

    @classmethod
    def _layout(cls, inner: Layout, units: Units) -> Layout:
        if inner.uniform is not None:
            tokens, lead = (count * units.each for count in inner.uniform)
            return Layout.alike(units.samples, tokens, lead, inner.lengths.device)
        lead_each = inner.lead  # none where some frame has lost its class token: one that no other frame shares
        return Layout.ragged(
            units.sum(inner.lengths),
            units.sum(inner.prefix),
            lead=None if lead_each is None else lead_each * units.each,
        )

    def told(self, values: Tensor) -> Tensor:
        return values.index_select(0, self._rows)

    def class_attention(self) -> Tensor:
        return self.told(self.own.class_attention()) / self.units.each

    def attention(self) -> Tensor:
        """Zero between tokens of different units."""
        inner, layout = self.own.layout, self.layout
        place = torch.empty_like(self._rows).index_copy_(0, self._rows, layout.row_index)  # of each own row
        columns = inner.pad(place, fill=layout.longest).to(torch.int64)[inner.row_image]  # (T, l)
        own = inner.unpad(self.own.attention().transpose(1, 2))  # (T, H, l)
        rows = own.new_zeros(len(own), own.shape[1], layout.longest + 1)
        rows = rows.scatter(2, columns[:, None].expand_as(own), own)[..., :-1]
        return layout.pad(self.told(rows)).transpose(1, 2)

    def positions(self) -> Tensor:
        pos, units = self.own.positions(), self.units
        place = units.places[units.number[self.own.layout.row_image], pos.clamp(min=0)]
        return self.told(place.masked_fill(pos < 0, -1))

    def back(self, decisions: Sequence[Decision], names: Sequence[str]) -> list[Decision]:
        found, rows, layout = [], self._rows, self.own.layout
        for decision, name in zip(decisions, names, strict=True):
            token_map, order, rows = self._back(decision.map, name, rows, layout)
            features = decision.features
            if features is not None and order is not None:
                features = features.index_select(0, order)
            found.append(replace(decision, map=token_map, features=features))
            layout = token_map.new
        return found

    def _back(self, given: TokenMap, name: str, rows: Tensor, layout: Layout) -> tuple[TokenMap, Tensor | None, Tensor]:
        """A map on tokens shown, the own rows of which are ``rows``: as a map on own tokens, of which shown token each
        own new one is, and the own rows of the new ones.
        """
        if type(given) is Mask:
            weight = torch.empty_like(given.weight).index_copy(0, rows, given.weight)
            return Mask.of(layout, weight), None, rows
        if isinstance(given, Merge) and given.ownerless is not None:
            raise ReducerError(
                f"{name} leaves tokens that are no one patch's continuation, so that they are in no frame, and this "
                "model's are decided on together; use a method that keeps patches or merges them into one of them "
                "(evit with fuse=False, tome, …), or {'over': 'frame'}"
            )
        if not isinstance(given, (Keep, Merge)):
            raise ReducerError(
                f"{name} mixes tokens of all frames, and this model's are decided on together; use a method that keeps "
                "patches or merges them, or {'over': 'frame'}"
            )
        lives = rows.index_select(0, given.source)  # the own row of which each new token is the continuation
        order = layout.row_image[lives].argsort(stable=True)  # inside a frame, tokens stay in the decided order
        lengths = torch.bincount(layout.row_image[lives], minlength=layout.images)
        new = Layout.ragged(lengths, layout.prefix, lead=layout.lead)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        if isinstance(given, Keep):
            return Keep(layout, new, lives[order]), order, place
        group = torch.cat([place, place.new_full((1,), -1)])[given.group]  # -1 stays -1
        own_group = torch.empty_like(group).index_copy_(0, rows, group)
        weight = torch.empty_like(given.weight).index_copy(0, rows, given.weight)
        return Merge(layout, new, own_group, weight, drops_none=given.drops_none), order, place


class Alike(OverUnits):
    """The places of a unit, which all units of a sample have in common."""

    word = "alike"

    def __init__(self, own: Signals, units: Units) -> None:
        layout = self.layout_of(own.layout, units)
        first = own.layout.starts.view(units.samples, units.each)[layout.row_image]  # (shown rows, units of a sample)
        self._rows = first + layout.row_index[:, None]
        super().__init__(own, units, layout, own.size[self._rows[:, 0]])

    @classmethod
    def _layout(cls, inner: Layout, units: Units) -> Layout:
        if inner.uniform is not None:
            return Layout.alike(units.samples, *inner.uniform, inner.lengths.device)
        return Layout.ragged(inner.lengths[:: units.each], inner.prefix[:: units.each], lead=inner.lead)

    def told(self, values: Tensor) -> Tensor:
        return values[self._rows].mean(1)

    def class_attention(self) -> Tensor:
        return self.told(self.own.class_attention())

    def attention(self) -> Tensor:
        return self.own.attention().unflatten(0, (self.units.samples, self.units.each)).mean(1)

    def positions(self) -> Tensor:
        return self.own.positions()[self._rows[:, 0]]

    def back(self, decisions: Sequence[Decision], names: Sequence[str]) -> list[Decision]:
        found, layout = [], self.own.layout
        for decision, name in zip(decisions, names, strict=True):
            if decision.features is not None:
                raise ReducerError(
                    f"{name} makes features of its own, and what it sees here is the mean of all frames; use another "
                    "method, or {'over': 'frame'}"
                )
            token_map = self._back(decision.map, name, layout)
            found.append(replace(decision, map=token_map))
            layout = token_map.new
        return found

    def _back(self, given: TokenMap, name: str, layout: Layout) -> TokenMap:
        each, shown, new = self.units.each, given.old, given.new
        of_unit = torch.arange(layout.images, device=layout.lengths.device) // each  # the unit shown in its place
        if type(given) is Mask:
            return Mask.of(layout, given.weight[self._same(shown, layout, of_unit)])
        if not isinstance(given, (Keep, Merge)):
            raise ReducerError(f"{name} mixes all tokens of a frame; use a method that keeps patches or merges them")
        if new.uniform is not None and new.images:
            after = Layout.alike(layout.images, *new.uniform, layout.lengths.device)
        else:
            after = Layout.ragged(new.lengths[of_unit], new.prefix[of_unit], lead=new.lead)
        if isinstance(given, Keep):
            place = (given.rows - shown.starts[new.row_image])[self._same(new, after, of_unit)]
            return Keep(layout, after, layout.starts[after.row_image] + place)
        same = self._same(shown, layout, of_unit)
        place = given.group - new.starts[shown.row_image]
        group = (place[same] + after.starts[layout.row_image]).masked_fill(given.group[same] < 0, -1)
        ownerless = None if given.ownerless is None else given.ownerless[self._same(new, after, of_unit)]
        return Merge(layout, after, group, given.weight[same], ownerless, given.drops_none)

    def _same(self, shown: Layout, own: Layout, of_unit: Tensor) -> Tensor:
        """(T,) the shown row of which each own one is a copy."""
        return shown.starts[of_unit[own.row_image]] + own.row_index
