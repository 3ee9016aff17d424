"""Counts: a number of patches for each image, in one value, whether images are alike or not.

Whoever works out how many tokens stay does it once, by a rule on plain integers; what needs a tensor asks for ``each``,
what needs to know beforehand asks for ``alike``, and ``Layout.leaving`` makes the new layout of either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reducers.lazy import cached_property

if TYPE_CHECKING:
    from reducers.tokens import Layout


@dataclass(frozen=True, eq=False)
class Counts:
    """How many of each image's patches are meant.

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
