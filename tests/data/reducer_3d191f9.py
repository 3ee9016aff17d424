"""Reducers as a user of commit 3d191f9 would have written them, in one file; they must go on running unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers import SCORES, Keep, Layout, Merge, Mix
from reducers.base import Decision, State, TokenReducer
from reducers.budget import Budget, Count
from reducers.methods.topk import keep_count, keep_highest
from reducers.registry import register
from reducers.scores import value_norm
from reducers.signals import Signals


@register("longest_keys")  # the README's
class KeepLongestKeys(TokenReducer):
    summary, source = "keep the patches of largest key norm", "this README"

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def decide(self, signals, state):
        scores = signals.keys().flatten(1).norm(dim=1)  # (T,), all images' tokens one after another
        kept = keep_highest(signals.layout, scores, keep_count(signals.layout, self.budget, state, "floor"))
        return None if kept is None else Decision(kept)


@register("largest")  # CONTRIBUTING's
class Largest(TokenReducer):
    """Keep the ``budget`` patch tokens whose value vectors are longest."""

    summary = "keep the patch tokens with the longest values"
    source = "where it was published"

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        count = keep_count(layout, self.budget, state, "floor")
        kept = keep_highest(layout, value_norm(signals.values()), count)
        return None if kept is None else Decision(kept)


@register("by_score")
class ByScore(TokenReducer):
    """Keep the patches of highest score, whichever score it is."""

    summary = "keep the patches of highest score"
    source = "a user"

    def __init__(self, budget: Budget, *, score: str = "class_attention", seed: int = 0) -> None:
        super().__init__()
        self.budget = budget
        self.score = score
        self.seed = seed
        self.needs_class_token = SCORES[score].needs_class_token
        self.uses_random = SCORES[score].uses_random

    def decide(self, signals: Signals, state: State) -> Decision | None:
        scores = SCORES[self.score].compute(signals, state, "concat", self.seed)
        kept = keep_highest(signals.layout, scores, keep_count(signals.layout, self.budget, state, "nearest"))
        return None if kept is None else Decision(kept)


@register("pair_up")
class PairUp(TokenReducer):
    """Merge patches that lie side by side in columns 2c and 2c + 1 of the image: their mean, or their maximum."""

    summary = "merge side by side"
    source = "a user"
    uses_positions = True

    def __init__(self, pool: str = "mean") -> None:
        super().__init__()
        self.pool = pool

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, pos = signals.layout, signals.positions()
        rows, columns = state.grid
        cells = rows * ((columns + 1) // 2)
        row = torch.div(pos, columns, rounding_mode="floor")
        cell = row * ((columns + 1) // 2) + torch.div(pos % columns, 2, rounding_mode="floor")
        lead = int(layout.prefix.max())
        place = torch.where(pos >= 0, lead + cell, lead + cells + layout.row_index)  # tokens that are no patch: alone
        place = torch.where(layout.is_prefix, layout.row_index, place)
        key = layout.row_image * (lead + cells + layout.longest) + place
        keys, group, members = torch.unique(key, return_inverse=True, return_counts=True)
        image = torch.div(keys, lead + cells + layout.longest, rounding_mode="floor")
        new = Layout.ragged(torch.bincount(image, minlength=layout.images), layout.prefix)
        merged = Merge(layout, new, group, 1 / members[group].float())
        if signals.counting:
            signals.spend(layout.patches * 1000.0)
        if self.pool == "mean":
            return Decision(merged, proportional=True)
        x = signals.output()
        lowest = x.new_full((new.rows, x.shape[1]), -torch.inf)
        return Decision(merged, lowest.scatter_reduce(0, group[:, None].expand_as(x), x, "amax"))


@register("brighter")
class Brighter(TokenReducer):
    """Keep the patches that are brighter than their image: known before any block has run."""

    summary = "keep bright patches"
    source = "a user"
    adaptive = True
    uses_positions = True

    def plan(self, images: Tensor, host: Any) -> Tensor:
        bright = F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), host.grid).flatten(1)
        return bright > bright.mean(dim=1, keepdim=True)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, pos = signals.layout, signals.positions()
        stays = state.plans[id(self)][layout.row_image, pos.clamp(min=0)] | (pos < 0)
        lengths = layout.sum_rows(stays.long())
        return Decision(Keep(layout, Layout.ragged(lengths, layout.prefix), stays.nonzero().squeeze(1)))


@register("half_input")
class HalfInput(TokenReducer):
    """Show the model the image at half its size."""

    summary = "half the size"
    source = "a user"

    def prepare(self, images: Tensor, host: Any) -> Tensor:
        return F.avg_pool2d(images, 2)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None


@register("asking")
class Asking(TokenReducer):
    """Learned queries mix the patches into ``budget`` tokens, before the block; trained to differ from each other."""

    summary = "learned queries"
    source = "a user"
    trained = True
    site = "input"
    trained_as = "any training"
    schedule = {"epochs": 1}  # noqa: RUF012  # as users write it

    def __init__(self, budget: Budget = Count(4), *, weight: float = 0.5) -> None:  # noqa: B008  # likewise
        super().__init__()
        self.budget = budget
        self.weight = weight

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        count = self.budget.count(host.patches, initial=host.patches, prefix=host.prefix, rounding="floor")
        self.queries = nn.ParameterDict({str(block): torch.randn(count, host.width) for block in blocks})

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, queries = signals.layout, self.queries[str(state.block)]
        tokens, prefix = layout.uniform
        shares = (queries @ layout.pad_patches(signals.output()).transpose(1, 2)).softmax(dim=2)  # (B, M, N)
        if state.training:
            state.note(self, shares)
        stays = torch.eye(prefix + len(queries), tokens, device=shares.device)
        stays[prefix:] = 0
        new = Layout.alike(layout.images, prefix + len(queries), prefix, shares.device)
        return Decision(Mix(layout, new, F.pad(shares, (prefix, 0, prefix, 0)) + stays))

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        alike = [(shares @ shares.transpose(1, 2)).mean() for shares in state.noted(self)]
        return {"alike": self.weight * torch.stack(alike).sum()}
