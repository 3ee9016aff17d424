"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022).

Inverse-transform sampling over significance scores: K evenly spaced points, each picks the token where the
cumulative score reaches it; a token picked several times is kept once. So K bounds the count from above, and the
count adapts to the image. The choice is hard: gradients pass through the rows that were chosen, never through the
choosing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers import noise
from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice, checked_flag, checked_seed
from reducers.decision import Decision
from reducers.maps import keep_patches, keep_rows
from reducers.reducer import Searchable, State, TokenReducer, Traits
from reducers.registry import register
from reducers.scores import Heads, find_score
from reducers.signals import Signals
from reducers.tokens import Counts, Layout

Variant = Literal["paper", "official", "unsorted", "gumbel"]
Lookup = Literal["inverse", "nearest"]


def significance(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores as a distribution over the candidates, float32 or wider;
    all-zero scores mean that all are alike. (B, N)
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~valid, 0)
    total = scores.sum(dim=1, keepdim=True)
    even = valid.to(scores.dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, scores / total.clamp(min=torch.finfo(scores.dtype).tiny), even)


def cumulative(scores: Tensor, valid: Tensor) -> Tensor:
    """The cumulative distribution over the candidates, float32 or wider, ending in exactly 1 at each image's last and
    staying there; all-zero scores mean that all are alike. (B, N)
    """
    sums = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~valid, 0).cumsum(dim=1)
    sums = torch.where(sums[:, -1:] > 0, sums, valid.to(sums.dtype).cumsum(dim=1))
    return sums / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)  # 0 without candidates


def sample_inverse(cdf: Tensor, points: Tensor | int) -> Tensor:
    """Tokens that hold at least one of the points u_k = (2k - 1) / 2K, k = 1 … K:
    the first with CDF >= u_k. (B, N) bool

    The number of points at or below a value c is floor(K c + 1/2), so no point is ever written out. points: (B,)
    int64, or one number for all.
    """
    each = points if isinstance(points, int) else points[:, None]
    reached = (cdf * each).add_(0.5).floor_()
    holds = reached > 0  # the first one, if any point lies at or below it
    holds[:, 1:].logical_and_(reached[:, 1:] > reached[:, :-1])
    return holds


def sample_nearest(cdf: Tensor, valid: Tensor, points: Tensor, used: Tensor) -> Tensor:
    """Tokens whose CDF value lies nearest to one of the points (B, K); ties go to the lower token. (B, N) bool

    ``used`` (B, K) marks the points that count, where images have different numbers of them.
    """
    ladder = cdf.masked_fill(~valid, torch.inf)
    above = torch.searchsorted(ladder, points.contiguous())  # first entry >= the point, so the first of equal ones
    last = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    above = torch.minimum(above, last)
    below = (above - 1).clamp(min=0)
    to_above, to_below = ladder.gather(1, above) - points, points - ladder.gather(1, below)
    low_value = ladder.gather(1, below).contiguous()
    first_below = torch.searchsorted(ladder, low_value)  # of equal entries below, the first
    nearest = torch.where(to_below.abs() <= to_above.abs(), torch.minimum(first_below, below), above)
    hits = torch.zeros(cdf.shape, dtype=torch.int32, device=cdf.device)
    hits.scatter_add_(1, nearest, used.to(torch.int32))
    return (hits > 0) & valid


def even_points(points: Tensor, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(2k - 1) / 2K for each image's own K, padded: (B, most) values and which of them count. points: (B,) int64."""
    k = torch.arange(1, most + 1, device=points.device)
    return (2 * k - 1).to(dtype) / (2 * points[:, None]).to(dtype), k <= points[:, None]


def sample_official(shares: Tensor, valid: Tensor, points: int) -> Tensor:
    """The authors' release, for one image alone: scores sorted ascending, CDF min-max normalised, ``points``
    points from the smallest positive CDF value to 1 inclusive, nearest CDF entry. (B, N) bool

    Padding the CDF with zeros on the left, as the release does, never wins: no point lies nearer to 0 than to the
    smallest positive value.
    """
    order = shares.masked_fill(~valid, torch.inf).sort(dim=1, stable=True).indices  # padding comes last
    ordered = shares.gather(1, order).masked_fill(~valid, 0)
    cdf = ordered.cumsum(dim=1)
    lowest = cdf[:, :1]
    highest = cdf.gather(1, (valid.sum(dim=1, keepdim=True) - 1).clamp(min=0))
    cdf = (cdf - lowest) / (highest - lowest).clamp(min=torch.finfo(cdf.dtype).tiny)
    positive = cdf.masked_fill(~valid | (cdf <= 0), torch.inf).amin(dim=1, keepdim=True)
    first = torch.where(positive.isfinite(), positive, torch.ones_like(positive))  # a single token: every point is 1
    ramp = torch.arange(points, device=cdf.device, dtype=cdf.dtype) / max(points - 1, 1)
    grid = first + ramp * (1 - first)
    hit = sample_nearest(cdf, valid, grid, torch.ones_like(grid, dtype=torch.bool))
    return torch.zeros_like(hit).scatter_(1, order, hit)


def sample_gumbel(shares: Tensor, valid: Tensor, points: Tensor, draws: Tensor) -> Tensor:
    """K independent draws from the distribution, by Gumbel-max; random at test time too. draws (B, K, N) in (0,
    1). (B, N) bool
    """
    logits = shares.double().log().masked_fill(~valid, -torch.inf)
    winners = (logits[:, None] - (-draws.log()).log()).argmax(dim=2)  # (B, K)
    used = torch.arange(draws.shape[1], device=points.device) < points[:, None]
    hits = torch.zeros(shares.shape, dtype=torch.int32, device=shares.device)
    hits.scatter_add_(1, winners, used.to(torch.int32))
    return (hits > 0) & valid


@register("ats")
class ATS(TokenReducer):
    """Sample patch tokens by inverse transform over their significance.

    The count kept never exceeds K, the number of sample points, and differs from image to image. Acts after the
    attention residual.

    Args:
        budget: K; ``Ratio`` rounds down.
        score: significance: ``class_attention_value_norm`` (the paper's), ``class_attention``, ``value_norm``,
            ``attention_received`` or ``random``.
        variant: ``paper``: CDF in token order, points (2k - 1) / 2K. ``official``: the authors' release, sorted
            ascending; its number of points is the initial patch count whatever the budget says, unless the budget is a
            ``Count``. ``unsorted`` and ``gumbel``: published re-implementations
            (K - 1 points, nearest; K random draws), different methods under the same name.
        heads: ``concat``: head-summed attention times the norm of the concatenated value (the authors' code), or
            ``per_head``.
        lookup: ``inverse``: the first token whose CDF reaches the point, or ``nearest`` (for ``paper``; the other
            variants fix theirs).
        keep_class_token: False lets the class token be sampled like any other (its score is the diagonal's); where it
            is dropped, the head reads the mean of the survivors. An experiment of the paper (Fig. A.4).
        seed: of ``score="random"`` and of ``variant="gumbel"``.
    """

    summary = "sample tokens by inverse transform over significance scores"
    source = "Fayyaz et al., ECCV 2022 (arXiv 2111.15667)"
    traits = Traits(adaptive=True, cuts_before_values=True)
    searchable: ClassVar[Searchable] = {
        "score": ("class_attention_value_norm", "class_attention", "attention_received", "value_norm"),
        "heads": ("concat", "per_head"),
        "lookup": ("inverse", "nearest"),
    }

    def __init__(
        self,
        budget: Budget,
        *,
        score: str = "class_attention_value_norm",
        variant: Variant = "paper",
        heads: Heads = "concat",
        lookup: Lookup = "inverse",
        keep_class_token: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "ATS")
        self.score = score
        self.variant = checked_choice(variant, Variant, "ATS(variant=…)")
        self.heads: Heads = checked_choice(heads, Heads, "ATS(heads=…)")  # type: ignore[assignment]
        self.lookup = checked_choice(lookup, Lookup, "ATS(lookup=…)")
        self.keep_class_token = checked_flag(keep_class_token, "ATS(keep_class_token=…)")
        self.seed = checked_seed(seed)
        self._score = find_score(score)
        self.traits = replace(
            self.traits,
            control=self._score.uses_random,
            needs_class_token=self._score.needs_class_token,
            may_drop_class_token=not self.keep_class_token,
            uses_random=self._score.uses_random or variant == "gumbel",
        )

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        scores = self._score.compute(signals, state, self.heads, self.seed).detach()
        if self.keep_class_token:
            padded = layout.pad_patches(scores)
            points = self._points(layout, state).alike
            if points is not None and padded.shape[1] and (self.variant, self.lookup) == ("paper", "inverse"):
                kept = keep_patches(layout, self._sample_alike(padded, points))
                if all(kept.new.patch_counts):  # else an image has no score above 0
                    return Decision(kept)
            return Decision(keep_patches(layout, self._sample(padded, layout.valid_patches, signals, state)))
        # the class token, which comes first, is a candidate; other prefix tokens are not
        candidates = layout.pad(~layout.is_prefix)
        candidates = candidates | layout.pad(signals.is_class_token)
        candidates = candidates & layout.valid
        chosen = self._sample(layout.pad(scores), candidates, signals, state)
        return Decision(keep_rows(layout, layout.unpad(chosen | (layout.valid & ~candidates))))

    def _sample_alike(self, scores: Tensor, points: int) -> Tensor:
        """The usual case in the few steps it needs: the published rule where all images have the same number of tokens,
        so that nothing is padding. Of an image whose scores are all zero nothing is sampled. (B, N) bool
        """
        sums = scores.to(torch.promote_types(scores.dtype, torch.float32)).cumsum(dim=1)
        return sample_inverse(sums / sums[:, -1:], points)

    def _sample(self, scores: Tensor, valid: Tensor, signals: Signals, state: State) -> Tensor:
        """Which candidates are kept, (B, N) bool."""
        layout = signals.layout
        if scores.shape[1] == 0:  # no image has a candidate left
            return valid
        each = self._points(layout, state)
        points, most = each.each, each.most
        if self.variant == "paper" and self.lookup == "inverse":
            return sample_inverse(cumulative(scores, valid), points) & valid
        shares = significance(scores, valid)
        if self.variant == "official":
            fixed = self.budget.spec().get("count", state.initial)
            return sample_official(shares, valid, int(fixed))
        if self.variant == "gumbel":
            assert state.image_keys is not None
            pairs = torch.arange(most * shares.shape[1], device=shares.device)
            # numbered by draw first, so that padding does not renumber another image's draws
            pairs = pairs // shares.shape[1] + (pairs % shares.shape[1]) * 2**20
            draws = noise.uniform(
                state.image_keys[:, None], pairs, seed=self.seed, stream=noise.stream(state.block, state.draw, kind=1)
            )
            return sample_gumbel(shares, valid, points, draws.view(shares.shape[0], most, shares.shape[1]))
        cdf = cumulative(scores, valid)
        if self.variant == "unsorted":
            grid, used = even_points(points, most, cdf.dtype)
            last = grid >= grid.gather(1, points[:, None] - 1)
            last = last & (points > 1)[:, None]  # of one point, that one stays
            return sample_nearest(cdf, valid, grid, used & ~last)
        return sample_nearest(cdf, valid, *even_points(points, most, cdf.dtype))

    def _points(self, layout: Layout, state: State) -> Counts:
        """How many points each image has."""
        count = self.budget.point_count
        return Counts.by(layout, lambda n, prefix: count(n, initial=state.initial, prefix=prefix, rounding="floor"))
