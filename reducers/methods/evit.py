"""EViT: keep the patches the class token attends to most, fuse the rest into one (Liang et al., ICLR 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_flag, checked_seed
from reducers.decision import Decision
from reducers.errors import ReducerError
from reducers.kit.selection import first_of, keep_count, keep_highest, rank_patches
from reducers.maps import Keep, Merge
from reducers.reducer import Searchable, State, TokenReducer, Traits
from reducers.registry import register
from reducers.scores import class_attention, find_score
from reducers.signals import Signals
from reducers.tokens import Counts, Layout


def fuse_the_rest(layout: Layout, chosen: Tensor, weights: Tensor, *, count: int | None) -> Merge:
    """Keep prefix and ``chosen`` patches (B, N) bool; one more token per image sums the others, weighted.

    weights: (T,), raw class attention, *not* renormalised, as the authors do. The fused token comes last, and only
    in images that leave something out; ``count`` says that every image keeps so many and does, so that uniform
    images stay uniform unasked.
    """
    if count is not None and layout.uniform is not None:
        return _fuse_alike(layout, chosen, weights, layout.uniform[1] + count)
    stays = layout.spread(chosen, prefix=True)  # (T,)
    kept = layout.sum_rows(stays.long())
    fused = (kept < layout.lengths).long()
    lengths = kept + fused
    new = Layout.ragged(lengths, layout.prefix)
    before = stays.long().cumsum(0) - 1  # kept rows so far over all images …
    place = before - (kept.cumsum(0) - kept)[layout.row_image]  # … and within the image
    place = torch.where(stays, place, kept[layout.row_image])
    group = new.starts[layout.row_image] + place
    weight = torch.where(stays, torch.ones_like(weights), weights)
    ownerless = new.row_index == kept[new.row_image]  # none where an image keeps all: its rows end before that
    return Merge(layout, new, group, weight, ownerless, drops_none=True)


def _fuse_alike(layout: Layout, chosen: Tensor, weights: Tensor, kept: int) -> Merge:
    """The same where every image keeps ``kept`` tokens, its prefix included: in half as many steps."""
    assert layout.uniform is not None
    tokens, prefix = layout.uniform
    stays = F.pad(chosen, (prefix, 0), value=True)  # (B, L)
    new = Layout.alike(layout.images, kept + 1, prefix, weights.device)
    place = torch.where(stays, stays.cumsum(1) - 1, kept)
    group = (place + new.starts[:, None]).view(layout.images * tokens)
    weight = torch.where(stays.view(-1), 1.0, weights)
    return Merge(layout, new, group, weight, new.row_index == kept, drops_none=True)


@register("evit")
class EViT(TokenReducer):
    """Keep the most attended patches and fuse what is left into one token, weighted by class attention.

    Acts after the attention residual, before the MLP. An earlier fused token is a candidate like any other. Where
    nothing is left out there is no fused token. The order of kept tokens is theirs in the image, not their rank: no
    later attention can tell the difference, and a method that goes by order (ATS's CDF, ToMe's sets) meets the patches
    in the image's order, the fused token last.

    Args:
        budget: tokens kept, of those entering the block without the prefix; ``Ratio`` rounds up.
        fuse: False drops the rest.
        select: another selecting reducer chooses (``ATS``), EViT fuses what it left; the budget then caps the choice.
        score: by which patches are ranked.
        seed: of ``score="random"``.
    """

    summary = "keep the most attended patches, fuse the rest into one token"
    source = "Liang et al., ICLR 2022 (arXiv 2202.07800)"
    searchable: ClassVar[Searchable] = {
        "fuse": (True, False),
        "score": ("class_attention", "class_attention_value_norm", "attention_received", "value_norm"),
        "select": (None, {"name": "ats", "budget": {"ratio": 1.0}}),  # as many points as there are tokens
    }

    def __init__(
        self,
        budget: Budget,
        *,
        fuse: bool = True,
        select: TokenReducer | None = None,
        score: str = "class_attention",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if select is not None and (not isinstance(select, TokenReducer) or select.name == "stack"):
            raise ReducerError(f"EViT(select={select!r}): the selector is one reducer, such as ATS(Ratio(0.7))")
        if select is not None and (not select.only_decides or select.traits.may_drop_class_token):
            raise ReducerError(f"EViT(select={select.name}): the selector must only decide, and keep the class token")
        self.budget = checked_budget(budget, "EViT")
        self.fuse = checked_flag(fuse, "EViT(fuse=…)")
        self.select = select
        self.score = score
        self.seed = checked_seed(seed)
        self._score = find_score(score)
        chooser = Traits() if select is None else select.traits
        self.traits = replace(
            self.traits,
            control=self._score.uses_random or chooser.control,
            needs_class_token=fuse or self._score.needs_class_token or chooser.needs_class_token,
            uses_random=self._score.uses_random or chooser.uses_random,
            uses_previous_attention=chooser.uses_previous_attention,
            adaptive=chooser.adaptive,
        )

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "ceil")
        if self.select is None and counts.alike is not None and counts.keep_all:
            return None
        scores = self._score.compute(signals, state, "concat", self.seed)
        selected = self._selected(signals, state)
        if selected is not None:
            scores = torch.where(selected, scores, -torch.inf)
            chosen_by_it = layout.sum_rows((selected & ~layout.is_prefix).long())
            counts = Counts.of(layout, torch.minimum(chosen_by_it, counts.each))
        if not self.fuse:
            kept = keep_highest(layout, scores, counts)
            return None if kept is None else Decision(kept)
        chosen = first_of(rank_patches(layout, scores), counts.each)
        weights = class_attention(signals.class_attention())
        merged = fuse_the_rest(layout, chosen, weights, count=counts.alike)
        if signals.counting:
            left_out = layout.lengths - (layout.prefix + counts.each)
            signals.spend(left_out * signals.values().shape[1:].numel())
        signals.output()  # fused features are those after the attention residual: every row is needed
        return Decision(merged)

    def _selected(self, signals: Signals, state: State) -> Tensor | None:
        """(T,) bool: what the selector keeps; None where EViT itself chooses."""
        if self.select is None:
            return None
        decision = self.select.decide(signals, state)
        if decision is None:
            return torch.ones(signals.layout.rows, dtype=torch.bool, device=signals.size.device)
        if not isinstance(decision.map, Keep):
            raise ReducerError(
                f"EViT(select={self.select.name}): the selector must keep or drop tokens, not merge them"
            )
        return decision.map.destination >= 0
