"""VidCom2: of each frame as many patches as it is unlike the rest of the video, those that are least typical (EMNLP
2025, Apache-2.0).

Published for what a vision tower hands to a language model, so its figures are those of language models. Here it acts
before a block, of a clip's embedded patches by default [D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reducers.budget import Budget, checked_budget, exact_fraction
from reducers.checks import checked_within
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.in_time import InTime
from reducers.kit.selection import first_of, keep_count
from reducers.maps import keep_patches, keep_ranked
from reducers.reducer import Searchable, State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of the Gaussian kernels, alpha


@dataclass(frozen=True)
class Groups:
    """Rows of tokens and the group of each."""

    number: Tensor  # (n,) the group of each row
    many: int  # groups, some of which may be empty

    def sum(self, values: Tensor) -> Tensor:
        """(n, ...) -> (groups, ...)."""
        return values.new_zeros(self.many, *values.shape[1:]).index_add(0, self.number, values)

    def count(self) -> Tensor:
        """(groups,) int64."""
        return self.sum(torch.ones_like(self.number))

    def mean(self, values: Tensor) -> Tensor:
        """(n, ...) -> (groups, ...), 0 of an empty one."""
        count = self.count().clamp(min=1).to(values.dtype)
        return self.sum(values) / count.view(-1, *[1] * (values.dim() - 1))


def typical(u: Tensor, centres: Tensor) -> Tensor:
    """How near unit vectors are to a centre: the sum over alpha of exp(-|u - c|^2 / (2 alpha)).
    (n, D), (n, D) -> (n,)
    """
    squared = (u - centres).square().sum(1)
    return sum((-squared / (2 * alpha)).exp() for alpha in WIDTHS)  # type: ignore[return-value]  # no empty sum


def steadiest(x: Tensor, clips: Groups, count: int) -> Tensor:
    """Which channels vary least over the patches of a clip. x (n, D) -> (clips, D) bool, ``count`` of each."""
    spread = clips.mean((x - clips.mean(x)[clips.number]).square())
    lowest = spread.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(spread, dtype=torch.bool).scatter_(1, lowest, True)


def frame_quotas(video: Tensor, clips: Groups, frames: Groups, share: Tensor, temperature: float) -> Tensor:
    """How many patches each frame is to keep. video (n,) how typical each patch is of its clip, share (clips,) of all
    patches -> (clips x frames,) int64, the frames of one clip side by side.

    p = softmax over frames of -mean / temperature; share x (1 + p - 1 / F), at most 1, of the frame's patches, halves
    upwards, and at least one of them.
    """
    own, each = frames.count(), frames.many // clips.many
    there = (own > 0).view(clips.many, each)
    mean = frames.mean(video).double().view(clips.many, each)
    weight = (-mean / temperature).masked_fill(~there, -torch.inf).softmax(1)
    scale = share[:, None] * (1 + weight - 1 / there.sum(1, keepdim=True))
    wanted = (scale.clamp(max=1).flatten() * own + 0.5).floor().long()
    return torch.minimum(wanted.clamp(min=1), own)


@register("vidcom2")
class VidCom2(TokenReducer):
    """Keep of each frame its least typical patches, and more of a frame that is unlike the video as a whole.

    Patches are compared as unit vectors over the channels that vary least, with the mean of the clip and with that of
    their frame. At the published temperature the frames' weights are nearly one-hot: one frame gets up to twice the
    share of the others. What that leaves too many are the most typical, what is missing the least typical of all: the
    count is met exactly [D, as vLLM does]. The budget is one of the clip, also where a model attends frame by frame
    [D], and a frame may be left with its class token alone. Place it at block 0, where it sees embedded patches,
    positions included [D]. Behind another reducer shares are of the patches left, and tokens that lie nowhere are a
    frame of their own [D]. In a model with tubelets a frame is a step in time, several frames deep.

    Args:
        budget: patches of the clip kept; ``Ratio`` rounds to the nearest.
        temperature: of the frames' weights, above 0.
        channels: share of the channels that are looked at, those of lowest variance; rounded down, at least one.
    """

    summary = "keep the least typical patches of a clip, more of an unusual frame"
    source = "VidCom2, EMNLP 2025"
    traits = Traits(site="input", uses_positions=True, whole_clip=True, inputs=("clips",))
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count", "drop")
    searchable: ClassVar[Searchable] = {"temperature": (0.01, 0.1), "channels": ("1/2", "1")}

    def __init__(self, budget: Budget, *, temperature: float = 0.01, channels: str | float = "1/2") -> None:
        super().__init__()
        self.budget = checked_budget(budget, "VidCom2")
        self.temperature = checked_within(temperature, "VidCom2(temperature=…)", low=0, above=True)
        self.channels = channels
        try:
            self._share = exact_fraction(str(channels))
        except (ValueError, ZeroDivisionError) as error:
            raise ReducerError(f"VidCom2(channels={channels!r}) is no number; give a share of the channels") from error
        if isinstance(channels, bool) or not 0 < self._share <= 1:
            raise ReducerError(f"VidCom2(channels={channels!r}) must lie in (0, 1]: a share of the channels")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "nearest")
        if counts.keep_all:
            return None
        x = signals.output()
        channels = max(int(self._share * x.shape[1]), 1)
        if signals.counting:
            signals.spend(layout.patches * (2 * channels + x.shape[1]) * counts.busy)
        in_time = InTime.of(signals, state)
        rows = (~layout.is_prefix).nonzero_static(size=sum(layout.patch_counts)).squeeze(1)
        clips = Groups(layout.row_image[rows], layout.images)
        frames = Groups(clips.number * (in_time.steps + 1) + in_time.frame[rows], layout.images * (in_time.steps + 1))
        x = x.index_select(0, rows)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        u = x * steadiest(x, clips, channels)[clips.number]  # a channel that is 0 takes no part in lengths or distances
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
        video = typical(u, clips.mean(u)[clips.number])
        score = video + typical(u, frames.mean(u)[frames.number])
        share = counts.each.double() / layout.patches.clamp(min=1)
        within = _ranks(score, frames) < frame_quotas(video, clips, frames, share, self.temperature)[frames.number]
        padded = layout.pad_patches(_back(score, rows, layout.rows), fill=torch.inf)
        order = _first_to_last(padded, layout.pad_patches(_back(within, rows, layout.rows)))
        if counts.alike is not None:
            return Decision(keep_ranked(layout, order, counts.alike))
        return Decision(keep_patches(layout, first_of(order, counts.each)))


def _first_to_last(score: Tensor, within: Tensor) -> Tensor:
    """Patches (B, N) from the first to be kept to the last: those within their frame's quota, then the others."""
    order = score.sort(dim=1, stable=True).indices
    others = (~within.gather(1, order)).to(torch.uint8)
    return order.gather(1, others.sort(dim=1, stable=True).indices)


def _back(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """Of some packed rows -> of all, 0 of the others."""
    return values.new_zeros(total).index_copy(0, rows, values)


def _ranks(score: Tensor, groups: Groups) -> Tensor:
    """(n,) how many of its group come before each, from the lowest score up; ties by their order."""
    order = score.sort(stable=True).indices
    order = order.gather(0, groups.number[order].sort(stable=True).indices)
    first = groups.count().cumsum(0) - groups.count()
    places = torch.arange(len(score), device=score.device) - first[groups.number[order]]
    return torch.empty_like(places).index_copy(0, order, places)
