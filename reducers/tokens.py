"""Packed tokens: all images' tokens one after another, so that no padding is ever multiplied.

``Layout`` says where each image's rows lie, ``Counts`` how many of them are meant; ``TokenBatch`` adds what travels
with them. Reducers compute on *packed* rows (T, ...) or, where a rule compares the tokens of one image, on the *padded*
view (B, N, ...) a layout gives.

What is called an image here is a **unit: what attends among itself**. In most models that is an image; where it is a
part of a sample, a frame of a clip or a window of an image, ``TokenBatch.units`` says whose, and all that is told of
each image is told of each unit: lengths, counts, budgets, class tokens. Reducers reduce inside units and never learn
which kind they are; cost, trace and provenance are told by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from reducers.lazy import cached_property


def _known(extent: int | Tensor) -> int:
    """An extent as a number: ``torch.jit.trace`` makes tensors of them, and counts are constants of its graph."""
    return int(extent) if isinstance(extent, Tensor) else extent


Decided = Literal["each", "together", "alike"]


@dataclass(frozen=True, eq=False)
class Units:
    """Whose parts the units of a layout are, where they are less than whole samples.

    Every sample has the same units in the same order, and those of one sample lie side by side.
    """

    samples: int  # B
    places: Tensor  # (units of a sample, n) int64: the patch of its sample in each place of a unit; -1 = no patch
    shared: int = 0  # prefix tokens of which every unit of a sample has a copy: they count once, and are never dropped
    decided: Decided = "each"  # what reducers decide on: each unit, all units of a sample together, or all alike
    shown: list[Layout] = field(default_factory=list)  # of the latest decision: the batch's layout, what reducers saw

    @property
    def each(self) -> int:
        """Units of a sample."""
        return self.places.shape[0]

    @cached_property
    def sample(self) -> Tensor:
        """(U,) the sample that each unit is part of."""
        return torch.arange(self.samples, device=self.places.device).repeat_interleave(self.each)

    @cached_property
    def number(self) -> Tensor:
        """(U,) its number among the units of its sample."""
        return torch.arange(self.each, device=self.places.device).repeat(self.samples)

    def sum(self, values: Tensor) -> Tensor:
        """Of each unit (U, ...) -> of each sample (B, ...)."""
        return values.view(self.samples, self.each, *values.shape[1:]).sum(1)

    def tokens(self, lengths: Tensor) -> Tensor:
        """The lengths of units (U,) -> the tokens of each sample (B,), those that units share counted once."""
        return self.sum(lengths) - (self.each - 1) * self.shared


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each image's tokens lie in a packed tensor of ``rows`` rows; prefix tokens come first in each image.

    ``uniform`` holds (tokens, prefix tokens) as plain ints when all images are alike: then every view is free
    and nothing has to be read back from the device.
    """

    lengths: Tensor  # (B,) int64 tokens of each image, prefix included; 0 is legal (an image that has finished)
    prefix: Tensor  # (B,) int64 class, distillation and register tokens that lead each image
    rows: int  # T, the sum of lengths
    uniform: tuple[int, int] | None = None
    on_host: tuple[list[int], list[int]] | None = None  # lengths and prefix as plain ints, where they have been read

    @classmethod
    def alike(cls, images: int, tokens: int, prefix: int, device: torch.device) -> Layout:
        """``images`` images of ``tokens`` tokens each."""
        lengths = torch.full((images,), tokens, dtype=torch.int64, device=device)
        return cls(lengths, torch.full_like(lengths, prefix), images * tokens, (tokens, prefix))

    @classmethod
    def ragged(cls, lengths: Tensor, prefix: Tensor, *, lead: int | None = None) -> Layout:
        """Images of any lengths, read to the host here: the one wait for the device of an adaptive stage. ``lead``:
        the prefix tokens of every image, where that is known.
        """
        if lead is None:
            counts, leads = torch.stack([lengths, prefix]).tolist()
        else:
            counts = lengths.tolist()
            leads = [lead] * len(counts)
        rows, uniform = sum(counts), None
        if len(counts) == 1:  # one image is always uniform: alone and in a batch then differ only in packing
            uniform = (rows, leads[0])
        return cls(lengths, prefix, rows, uniform, (counts, leads))

    @classmethod
    def listed(cls, counts: list[int], device: torch.device) -> Layout:
        """Images of so many tokens each, none of them a prefix token."""
        lengths = torch.tensor(counts, dtype=torch.int64, device=device)
        uniform = (counts[0], 0) if counts and min(counts) == max(counts) else None
        return cls(lengths, torch.zeros_like(lengths), sum(counts), uniform, (counts, [0] * len(counts)))

    def leaving(self, counts: Counts) -> Layout:
        """The layout in which so many patches of each image are left behind its prefix."""
        if counts.alike is not None:
            assert self.uniform is not None
            prefix = self.uniform[1]
            return Layout.alike(self.images, prefix + counts.alike, prefix, self.lengths.device)
        lengths = self.prefix + counts.each
        if self.on_host is None or not counts.known:
            return Layout.ragged(lengths, self.prefix)
        leads = self.on_host[1]
        tokens = [prefix + count for prefix, count in zip(leads, counts.on_host, strict=True)]
        return Layout(lengths, self.prefix, sum(tokens), None, (tokens, leads))

    @property
    def images(self) -> int:
        return self.lengths.shape[0]

    @cached_property
    def counts(self) -> list[int]:
        """Lengths on the host."""
        if self.uniform is not None:
            return [self.uniform[0]] * self.images
        assert self.on_host is not None
        return self.on_host[0]

    @cached_property
    def patch_counts(self) -> list[int]:
        """Patches of each image on the host."""
        if self.uniform is not None:
            return [self.uniform[0] - self.uniform[1]] * self.images
        assert self.on_host is not None
        return [length - lead for length, lead in zip(*self.on_host, strict=True)]

    @cached_property
    def kind_of_each(self) -> list[tuple[int, int]]:
        """(patches, prefix tokens) of each image, on the host."""
        if self.uniform is not None:
            return [(self.uniform[0] - self.uniform[1], self.uniform[1])] * self.images
        assert self.on_host is not None
        return [(length - lead, lead) for length, lead in zip(*self.on_host, strict=True)]

    @cached_property
    def kinds(self) -> set[tuple[int, int]]:
        """The different (patches, prefix tokens) that images have, on the host."""
        if self.uniform is not None:
            return {(self.uniform[0] - self.uniform[1], self.uniform[1])}
        assert self.on_host is not None
        return {(length - lead, lead) for length, lead in zip(*self.on_host, strict=True)}

    @cached_property
    def longest(self) -> int:
        return self.uniform[0] if self.uniform is not None else max(self.counts, default=0)

    @cached_property
    def outset(self) -> Tensor:
        """(B,) zeros: for views that begin with each image's very first token."""
        return torch.zeros_like(self.prefix)

    @cached_property
    def starts(self) -> Tensor:
        """(B,) packed row of each image's first token."""
        if self.uniform is not None:
            return torch.arange(self.images, device=self.lengths.device) * self.uniform[0]
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def offsets(self) -> Tensor:
        """(B + 1,) int32: where each image begins and the last one ends, as flash attention over packed rows wants."""
        ends = self.starts + self.lengths
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)

    @cached_property
    def lead(self) -> int | None:
        """Prefix tokens of each image on the host, where all images have the same number."""
        if self.uniform is not None:
            return self.uniform[1]
        assert self.on_host is not None
        leads = self.on_host[1]
        return leads[0] if len(set(leads)) == 1 else None

    @cached_property
    def row_image(self) -> Tensor:
        """(T,) the image each packed row belongs to."""
        images = torch.arange(self.images, device=self.lengths.device)
        if self.uniform is not None:
            return images[:, None].expand(-1, self.uniform[0]).flatten()
        return images.repeat_interleave(self.lengths, output_size=self.rows)

    @cached_property
    def row_index(self) -> Tensor:
        """(T,) the place of each packed row within its image, prefix included."""
        if self.uniform is not None:
            return self._columns.expand(self.images, -1).flatten()
        return torch.arange(self.rows, device=self.lengths.device) - self.starts[self.row_image]

    @cached_property
    def is_prefix(self) -> Tensor:
        """(T,) bool."""
        if self.uniform is not None:
            return self.row_index < self.uniform[1]
        return self.row_index < self.prefix[self.row_image]

    @cached_property
    def patches(self) -> Tensor:
        """(B,) tokens of each image that are not prefix tokens (a fused token counts)."""
        return self.lengths - self.prefix

    @cached_property
    def _columns(self) -> Tensor:
        return torch.arange(self.longest, device=self.lengths.device)

    @cached_property
    def valid(self) -> Tensor:
        """(B, L) bool: which places of the padded token view hold a token."""
        return self._columns < self.lengths[:, None]

    @cached_property
    def valid_patches(self) -> Tensor:
        """(B, L - smallest prefix) bool: which places of the padded patch view hold a token."""
        return self.valid_from(self.prefix)

    def valid_from(self, first: Tensor) -> Tensor:
        """As ``valid``, for the view that leaves out the ``first`` tokens of each image; first: (B,)."""
        width = self.width_from(first)
        return self._columns[:width] < (self.lengths - first)[:, None]

    def width_from(self, first: Tensor) -> int:
        """Places of the view that leaves out the ``first`` tokens; free for ``prefix`` and ``outset`` themselves."""
        if first is self.outset:
            return self.longest
        if first is self.prefix:
            return self.uniform[0] - self.uniform[1] if self.uniform is not None else max(self.patch_counts, default=0)
        return max((n - f for n, f in zip(self.counts, first.tolist(), strict=True)), default=0)

    def pad(self, values: Tensor, first: Tensor | None = None, *, fill: float = 0.0) -> Tensor:
        """Packed (T, ...) -> padded (B, L, ...), each image's tokens from ``first`` (B,) on, left-aligned."""
        if first is None:
            first = self.outset
        if self.uniform is not None:
            skip = self.uniform[0] - self.width_from(first)
            padded = values.reshape(self.images, self.uniform[0], *values.shape[1:])
            return padded[:, skip:] if skip else padded
        valid = self.valid_from(first)
        rows = (self.starts + first)[:, None] + self._columns[: valid.shape[1]]
        padded = values[rows.clamp_(max=max(self.rows - 1, 0))]
        keep = valid.reshape(*valid.shape, *[1] * (values.dim() - 1))
        return torch.where(keep, padded, torch.full((), fill, dtype=values.dtype, device=values.device))

    def pad_patches(self, values: Tensor, *, fill: float = 0.0) -> Tensor:
        """Packed (T, ...) -> (B, N, ...) without the prefix tokens."""
        return self.pad(values, self.prefix, fill=fill)

    def unpad(self, padded: Tensor) -> Tensor:
        """The opposite of ``pad``: (B, L, ...) -> (T, ...)."""
        if self.uniform is not None:
            return padded.flatten(0, 1)
        return padded.flatten(0, 1).index_select(0, self.row_image * padded.shape[1] + self.row_index)

    def spread(self, padded: Tensor, *, prefix: float | bool) -> Tensor:
        """Patch values (B, N) -> packed (T,), with one value for all prefix rows."""
        prefix = prefix + 0  # no graph of TorchScript holds True as a number
        if self.uniform is not None:
            lead = padded.new_full((1, 1), prefix).expand(self.images, self.uniform[1])
            return torch.cat([lead, padded], dim=1).flatten()
        if padded.shape[1] == 0:  # no image has a patch left
            return padded.new_full((self.rows,), prefix)
        place = (self.row_index - self.prefix[self.row_image]).clamp(min=0)
        return padded.flatten()[self.row_image * padded.shape[1] + place].masked_fill(self.is_prefix, prefix)

    def sum_rows(self, values: Tensor) -> Tensor:
        """(T,) -> (B,) sum over each image's rows."""
        if self.uniform is not None:
            return values.view(self.images, self.uniform[0]).sum(1)
        return torch.zeros(self.images, dtype=values.dtype, device=values.device).index_add_(0, self.row_image, values)


@dataclass(frozen=True, eq=False)
class Counts:
    """How many of each image's patches are meant, in one value, whether images are alike or not.

    Who works out how many tokens stay does it once, by a rule on plain integers; what needs a tensor asks for ``each``,
    what needs to know beforehand asks for ``alike``, and ``Layout.leaving`` makes the new layout of either.

    Where all images of the layout are alike it is one number, ``alike``, and then nothing is read from the device;
    where they are not, a number for each, known on the host unless it was ``measured`` on the device.
    """

    layout: Layout
    alike: int | None
    _listed: list[int] | None = None
    _measured: Tensor | None = None

    @classmethod
    def by(cls, layout: Layout, rule: Callable[[int, int], int]) -> Counts:
        """What a rule makes of an image's patches and prefix tokens; asked once for each kind of image there is."""
        if layout.uniform is not None:
            tokens, prefix = layout.uniform
            return cls(layout, rule(tokens - prefix, prefix))
        found = {kind: rule(*kind) for kind in layout.kinds}
        return cls(layout, None, [found[kind] for kind in layout.kind_of_each])

    @classmethod
    def of(cls, layout: Layout, given: Counts | Tensor | int) -> Counts:
        """A number for all images of a layout, or one for each (B,) int64 that lies on the device."""
        if isinstance(given, Counts):
            return given
        return cls(layout, given) if isinstance(given, int) else cls(layout, None, _measured=given)

    @cached_property
    def each(self) -> Tensor:
        """(B,) int64."""
        if self._measured is not None:
            return self._measured
        if self.alike is not None:
            return torch.full_like(self.layout.lengths, self.alike)
        listed = torch.tensor(self._listed, dtype=torch.int64)
        return listed.to(self.layout.lengths.device, non_blocking=True)

    @cached_property
    def on_host(self) -> list[int]:
        """The same as plain integers; where it was measured, this waits for the device."""
        if self._listed is not None:
            return self._listed
        return [self.alike] * self.layout.images if self.alike is not None else self.each.tolist()

    @property
    def known(self) -> bool:
        """Nothing has to be read from the device."""
        return self._measured is None

    @property
    def most(self) -> int:
        """The largest of them, 0 without images."""
        return self.alike if self.alike is not None else max(self.on_host, default=0)

    @property
    def keep_all(self) -> bool:
        """No image has more patches than so many."""
        if self.alike is not None:
            return self.alike >= self.layout.width_from(self.layout.prefix)
        return all(count >= patches for count, patches in zip(self.on_host, self.layout.patch_counts, strict=True))

    @property
    def busy(self) -> Tensor:
        """(B,) float64: 1 for images that have more patches than so many, 0 for others, which cost nothing."""
        return (self.each < self.layout.patches).double()

    @property
    def left(self) -> Counts:
        """The patches that are left when so many go."""
        return self.map(lambda patches, count: patches - count)

    def map(self, rule: Callable[[int, int], int]) -> Counts:
        """What a rule makes of each image's patches and its count."""
        if self.alike is not None:
            return Counts(self.layout, rule(self.layout.width_from(self.layout.prefix), self.alike))
        pairs = zip(self.layout.patch_counts, self.on_host, strict=True)
        return Counts(self.layout, None, [rule(patches, count) for patches, count in pairs])


Carry = Literal["sum", "log of the sum", "heaviest", "destination", "class row", "what lives"]
"""How a map carries a field: by the members of each new token their sum (of logarithms: of what they are logarithms
of), or what the heaviest of them has; rows of tokens, which go where the tokens go; and the like (``decision``)."""


def _how(carry: Carry) -> dict[str, Carry]:
    return {"carried": carry}


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """All images' tokens, packed, and what every later step must know of them.

    A field says itself how maps carry it; one that does not belong to tokens stays as it is.
    """

    x: Tensor  # (T, D)
    layout: Layout
    # (T,) float32: how many original tokens each stands for
    size: Tensor = field(metadata=_how("sum"))
    # (B,) packed row of the class token, -1 where there is none
    cls: Tensor = field(metadata=_how("class row"))
    # (T,) original patch of its unit that a token still is, else -1; kept while tracing or on demand
    pos: Tensor | None = field(default=None, metadata=_how("heaviest"))
    # (T, 3) float32: the sum of its patches' coordinates, and how many they are; kept where a host asks for the mean
    centroid: Tensor | None = field(default=None, metadata=_how("sum"))
    # (T,) float32, added to the attention logits of every later block
    key_bias: Tensor | None = field(default=None, metadata=_how("log of the sum"))
    biased: Tensor | None = None  # (B,) bool: images that have such a bias; None: all, if any
    # (T,) attention received in the block before, kept where the next block asks for it
    received: Tensor | None = field(default=None, metadata=_how("sum"))
    # (T,) float32 in [0, 1], under a training mask alone: what is left of a token as a key
    alive: Tensor | None = field(default=None, metadata=_how("what lives"))
    # (B, N0) packed row that carries each original patch of a sample, -1 = dropped; kept while tracing
    origin: Tensor | None = field(default=None, metadata=_how("destination"))
    # (B, N0) patch of the image in which each original token lies, where that is not the one of its number; kept while
    # tracing
    lies: Tensor | None = None
    tables: Any = None  # what a host has made for its blocks in this pass, such as a table of rotations by place
    units: Units | None = None  # whose parts the images of the layout are; None: they are the samples themselves

    @classmethod
    def from_images(cls, x: Tensor, *, prefix: int, has_class_token: bool, track: bool) -> TokenBatch:
        """(B, N, D) features as a timm ViT hands them to its blocks."""
        images, tokens = (_known(extent) for extent in x.shape[:2])
        layout = Layout.alike(images, tokens, prefix, x.device)
        class_rows = layout.starts if has_class_token else torch.full_like(layout.starts, -1)
        pos = None
        if track:
            pos = (layout.row_index - prefix).clamp(min=-1)
        size = torch.ones(images * tokens, dtype=torch.float32, device=x.device)
        return cls(x.flatten(0, 1), layout, size, class_rows, pos)

    def lattice(self) -> Tensor:
        """(B, N) the packed row of each patch of each sample, where nothing has been reduced yet."""
        layout = self.layout
        assert layout.uniform is not None
        patches = torch.arange(layout.uniform[0] - layout.uniform[1], device=self.x.device)
        rows = (layout.starts + layout.uniform[1])[:, None] + patches
        if self.units is None:
            return rows
        by_unit = rows.view(self.samples, -1)  # in the order of units; -> in that of the sample's own patches
        return torch.empty_like(by_unit).index_copy_(1, self.units.places.flatten(), by_unit)

    def with_origin(self, carrier: Tensor | None = None) -> TokenBatch:
        """With provenance from here on, nothing having been reduced yet.

        ``carrier`` (N0,): where the samples came in smaller than their own size, the patch that covers each original
        one.
        """
        rows = self.lattice()
        return replace(self, origin=rows if carrier is None else rows[:, carrier])

    @property
    def samples(self) -> int:
        """B: images or clips, whatever their units are."""
        return self.layout.images if self.units is None else self.units.samples

    @property
    def starts(self) -> Tensor:
        """(B,) packed row of each sample's first token."""
        starts = self.layout.starts
        return starts if self.units is None else starts.view(self.samples, self.units.each)[:, 0]

    @property
    def lengths(self) -> Tensor:
        return self.layout.lengths

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(T, ...) -> (B, L, ...) and which of its places hold a token (B, L)."""
        return self.layout.pad(values), self.layout.valid
