"""Token maps: what a reduction does to the tokens, as a value.

Almost every method is linear in the tokens, ``X' = W X`` with one small W per image. A map holds W in the cheapest form
that says it all, and carries anything that belongs to tokens through it: features, sizes, provenance, another map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.lazy import cached_property
from reducers.tokens import Layout


@dataclass(frozen=True, eq=False)
class TokenMap:
    """From the tokens of ``old`` to those of ``new``."""

    old: Layout
    new: Layout

    def apply(self, x: Tensor) -> Tensor:
        """W x: features (T, ...) -> (M, ...)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is applied")

    def total(self, values: Tensor) -> Tensor:
        """Sum over the members of each new token, weights left out: sizes, attention columns. (T, ...) -> (M, ...)"""
        raise NotImplementedError(f"{type(self).__name__} does not say what its members are")

    @property
    def destination(self) -> Tensor:
        """(T,) packed new row each old row went to (for a dense W: its largest weight), -1 = dropped."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its tokens go")

    @property
    def source(self) -> Tensor:
        """(M,) packed old row that lives on in each new row (of a group its heaviest member), -1 = none."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its tokens come from")

    def member_weights(self) -> Tensor:
        """(T,) the weight each old token has in its destination."""
        raise NotImplementedError(f"{type(self).__name__} is no assignment of tokens to tokens")

    def matrix(self) -> Tensor:
        """W written out, (B, M, N) padded with zeros: for tests and analysis, never on the way to a result."""
        identity = torch.eye(self.old.longest, dtype=torch.float64, device=self.old.lengths.device)
        rows = identity[self.old.row_index]  # (T, N): each token as a unit vector of its image
        return self.new.pad(self.apply(rows))

    def then(self, other: TokenMap) -> TokenMap:
        """This map, and the other on what it leaves."""
        if isinstance(self, Keep) and isinstance(other, Keep):
            return Keep(self.old, other.new, self.rows[other.rows])
        if isinstance(self, Mix) or isinstance(other, Mix):
            return Mix(self.old, other.new, other.matrix() @ self.matrix())
        first = self.destination
        second = torch.cat([other.destination, first.new_full((1,), -1)])[first]  # row -1 stays -1
        weight = self.member_weights() * torch.cat([other.member_weights(), other.member_weights().new_zeros(1)])[first]
        lives = torch.cat([self.source, self.source.new_full((1,), -1)])[other.source]  # row -1 stays -1
        return Merge(self.old, other.new, second, weight, lives < 0)


@dataclass(frozen=True, eq=False)
class Keep(TokenMap):
    """Gather: some tokens stay as they are, the others are gone (top-K, ATS, random drop)."""

    rows: Tensor  # (M,) packed old rows, image by image

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.rows)

    def total(self, values: Tensor) -> Tensor:
        return self.apply(values)

    @cached_property
    def destination(self) -> Tensor:
        where = torch.full((self.old.rows,), -1, dtype=torch.int64, device=self.rows.device)
        where[self.rows] = torch.arange(self.new.rows, device=self.rows.device)
        return where

    @property
    def source(self) -> Tensor:
        return self.rows

    def member_weights(self) -> Tensor:
        return (self.destination >= 0).double()


@dataclass(frozen=True, eq=False)
class Merge(TokenMap):
    """Each old token goes to at most one new one, with a weight (ToMe's groups, EViT's fused token)."""

    group: Tensor  # (T,) packed new row of each old row, -1 = dropped
    weight: Tensor  # (T,) its weight there; not necessarily normalised
    ownerless: Tensor | None = None  # (M,) bool: new rows that are nobody's continuation (EViT's fused token)
    drops_none: bool = False  # no group is -1: known beforehand, it spares a step

    @cached_property
    def _slot(self) -> Tensor:
        """``group`` with one more row, behind the last, for what is dropped: nobody has to ask the device for it."""
        if self.drops_none:
            return self.group
        return self.group.where(self.group >= 0, self.new.rows)

    def _add_up(self, values: Tensor) -> Tensor:
        out = values.new_zeros(self.new.rows + int(not self.drops_none), *values.shape[1:])
        return out.index_add_(0, self._slot, values)[: self.new.rows]

    def apply(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return self._add_up(x * weight.reshape(-1, *[1] * (x.dim() - 1)))

    def total(self, values: Tensor) -> Tensor:
        return self._add_up(values)

    @property
    def destination(self) -> Tensor:
        return self.group

    @cached_property
    def source(self) -> Tensor:
        weight = self.weight.double()
        heaviest = weight.new_full((self.new.rows + 1,), -torch.inf).scatter_reduce_(0, self._slot, weight, "amax")
        members = torch.arange(self.old.rows, device=weight.device)
        members = members.where(weight >= heaviest[self._slot], self.old.rows)
        first = torch.full_like(heaviest, self.old.rows, dtype=torch.int64)
        first = first.scatter_reduce_(0, self._slot, members, "amin")[:-1]
        first = first.masked_fill(first == self.old.rows, -1)
        return first if self.ownerless is None else first.masked_fill(self.ownerless, -1)

    def member_weights(self) -> Tensor:
        return self.weight.double() * (self.group >= 0)


@dataclass(frozen=True, eq=False)
class Mix(TokenMap):
    """A dense W for each image (PatchMerger, Sinkhorn, STViT, and what comes of composing with one)."""

    weights: Tensor  # (B, M, N) padded over all tokens, prefix rows included
    continued: Tensor | None = None  # (M,) packed old row that lives on in each new one, where that is known (GTP)

    def apply(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) if x.dim() > 1 else x[:, None]
        mixed = self.weights.to(x.dtype) @ self.old.pad(flat)
        return self.new.unpad(mixed).view(self.new.rows, *x.shape[1:])

    def total(self, values: Tensor) -> Tensor:
        return self.apply(values.double()).to(values.dtype)  # wide, so that a batch's shape leaves no trace in sizes

    @cached_property
    def destination(self) -> Tensor:
        if self.new.longest == 0:  # no image has a token left: there is no largest weight
            return torch.full((self.old.rows,), -1, dtype=torch.int64, device=self.weights.device)
        largest, where = self.weights.max(dim=1)  # (B, N)
        packed = self.old.unpad(where + self.new.starts[:, None])
        return packed.masked_fill(self.old.unpad(largest) <= 0, -1)

    @cached_property
    def source(self) -> Tensor:
        if self.continued is not None:
            return self.continued
        if self.old.longest == 0:
            return torch.full((self.new.rows,), -1, dtype=torch.int64, device=self.weights.device)
        largest, where = self.weights.max(dim=2)  # (B, M)
        packed = self.new.unpad(where + self.old.starts[:, None])
        return packed.masked_fill(self.new.unpad(largest) <= 0, -1)


@dataclass(frozen=True, eq=False)
class Mask(TokenMap):
    """Training only: every token stays, and counts as a key of others by its weight; it always sees itself.

    Lets gradients through a decision that inference carries out as a gather (DynamicViT, section 3.3). It removes
    nothing, so it saves nothing and is never traced.
    """

    weight: Tensor  # (T,) in [0, 1], differentiable; 1 for prefix tokens

    @classmethod
    def of(cls, layout: Layout, weight: Tensor) -> Mask:
        return cls(layout, layout, weight)

    def apply(self, x: Tensor) -> Tensor:
        return x

    def total(self, values: Tensor) -> Tensor:
        return values

    @property
    def destination(self) -> Tensor:
        return torch.arange(self.old.rows, device=self.weight.device)

    @property
    def source(self) -> Tensor:
        return self.destination

    def member_weights(self) -> Tensor:
        return torch.ones_like(self.weight, dtype=torch.float64)

    def harden(self) -> Keep:
        """The gather that inference would do."""
        return keep_rows(self.old, (self.weight >= 0.5) | self.old.is_prefix)


def keep_rows(layout: Layout, chosen: Tensor) -> Keep:
    """Keep the rows where ``chosen`` (T,) bool holds; the count may differ from image to image."""
    lengths = layout.sum_rows(chosen.long())
    prefix = layout.sum_rows((chosen & layout.is_prefix).long())
    new = Layout.ragged(lengths, prefix)
    rows = chosen.nonzero_static(size=new.rows).squeeze(1)  # their number is known: nothing is asked of the device
    return Keep(layout, new, rows)


def keep_patches(layout: Layout, chosen: Tensor) -> Keep:
    """Keep the prefix tokens and the patches where ``chosen`` (B, N) bool holds; it holds nowhere in the padding."""
    lead = layout.lead
    if lead is None:  # some image has lost a prefix token
        return keep_rows(layout, layout.spread(chosen, prefix=True))
    kept = F.pad(chosen, (lead, 0), value=True)
    new = Layout.ragged(kept.sum(dim=1), layout.prefix, lead=lead)
    rows = kept.flatten().nonzero_static(size=new.rows).squeeze(1)
    if layout.uniform is None:  # from places in the padded view to packed rows
        width = kept.shape[1]
        padding = layout.starts - torch.arange(layout.images, device=rows.device) * width
        rows = rows + padding[rows // width]
    return Keep(layout, new, rows)


def keep_ranked(layout: Layout, order: Tensor, count: int) -> Keep:
    """Keep the prefix and the first ``count`` patches of ``order`` (B, N), in token order; images must be alike.

    Knows the result's size beforehand, so nothing waits for the device.
    """
    assert layout.uniform is not None
    prefix = layout.uniform[1]
    index = order[:, :count].sort(dim=1).values + prefix
    lead = torch.arange(prefix, device=order.device).expand(layout.images, -1)
    rows = torch.cat([lead, index], dim=1) + layout.starts[:, None]
    new = Layout.alike(layout.images, prefix + count, prefix, order.device)
    return Keep(layout, new, rows.reshape(-1))
