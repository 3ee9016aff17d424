"""ToFu: prune matched tokens early, merge them late and keep their norm (Kim et al., WACV 2024).

Early blocks are far from linear in their tokens, so that the mean of two tokens is no token they know; there the more
redundant of a pair is dropped. Later blocks merge, and the mean is stretched to the longest of its members. The
account here rests on memory [R].
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from reducers.budget import Budget
from reducers.checks import checked_share
from reducers.decision import Decision
from reducers.kit.pairs import PairMerging
from reducers.maps import Keep, Merge
from reducers.reducer import Searchable, State
from reducers.registry import register
from reducers.signals import Signals


def group_peaks(norm: Tensor, merge: Merge) -> Tensor:
    """The longest norm in each new token's group, (T,) norms -> (M,), without a reduction by scattering.

    Groups are small next to the sequence, so the padded (B, M, N) membership is compared directly.
    """
    old, new = merge.old, merge.new
    target = old.pad(merge.group - new.starts[old.row_image], fill=-1)  # (B, N) the place it goes to
    place = torch.arange(new.longest, device=norm.device)
    member = (target[:, None] == place[:, None]) & old.valid[:, None]
    peaks = old.pad(norm)[:, None].masked_fill(~member, 0).amax(dim=2)
    return new.unpad(peaks)


def norm_preserving(x: Tensor, merge: Merge) -> Tensor:
    """MLERP: the direction of the size-weighted mean, the norm of the longest member. x (T, D) -> (M, D)

    Tokens without a partner are untouched. A mean of exactly zero has no direction and stays zero.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = merge.apply(wide)
    length = mean.norm(dim=1)
    stretch = group_peaks(wide.norm(dim=1), merge) / length.clamp(min=torch.finfo(wide.dtype).tiny)
    alone = merge.total(torch.ones(x.shape[0], dtype=torch.float32, device=x.device)) == 1
    stretch = torch.where(alone | (length == 0), torch.ones_like(stretch), stretch)
    return (mean * stretch[:, None]).to(x.dtype)


def without_sources(merge: Merge) -> Keep:
    """The pruning that matches a merge of pairs: its destinations as they were, in the same order.

    ToMe merges even-placed tokens into odd-placed ones, so the destination of a group is its odd member, and an even
    one without an odd one beside it stays by itself.
    """
    old, new = merge.old, merge.new
    odd = old.row_index % 2 == 1
    hosted = merge.total((odd & ~old.is_prefix).to(torch.float32)) > 0
    sources = ~odd & hosted[merge.group]
    slot = torch.where(sources, new.rows, merge.group)  # sources are written to a row that is cut off
    rows = torch.zeros(new.rows + 1, dtype=torch.int64, device=slot.device)
    return Keep(old, new, rows.scatter(0, slot, torch.arange(old.rows, device=slot.device))[: new.rows])


@register("tofu")
class ToFu(PairMerging):
    """ToMe's matching; in early blocks the matched token is pruned, in later ones merged with its norm kept.

    Pruning drops the source and leaves the destination unchanged. Merging takes the direction of the size-weighted mean
    and the norm of the longest member. At most half the tokens can go in one block: a larger request is cut to that,
    with a warning.

    Args:
        budget: ``Drop(r)``, or what stays; ``Ratio`` rounds that up.
        switch: share of the depth before which blocks prune; half is our decision [D].
        proportional: later attention is weighted by size, as in ToMe (a pruned token's size is lost).
    """

    summary = "prune matched tokens in early blocks, merge them with their norm kept in later ones"
    source = "Kim et al., WACV 2024 (arXiv 2312.01026)"
    searchable: ClassVar[Searchable] = {"switch": (0.5, 0.25, 0.75), "proportional": (True, False)}

    def __init__(self, budget: Budget, *, switch: float = 0.5, proportional: bool = True) -> None:
        super().__init__(budget, proportional=proportional)
        self.switch = checked_share(switch, "ToFu(switch=…)", of="the depth")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        merge = self.matched(signals, state)
        if merge is None:
            return None
        if state.block < self.switch * state.depth:
            return Decision(without_sources(merge), proportional=self.proportional)
        features = norm_preserving(signals.output(), merge)
        if signals.counting:  # norms of tokens and means, the stretch
            moved = (merge.new.lengths < merge.old.lengths).double()
            signals.spend(moved * (merge.old.lengths + 2 * merge.new.lengths) * features.shape[1])
        return Decision(merge, features, proportional=self.proportional)
