"""GTP-ViT: tokens that matter little pass on what they know to their neighbours, and go (Xu et al., WACV 2024)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice, checked_share
from reducers.decision import Decision
from reducers.kit.selection import keep_count, keep_highest
from reducers.maps import Mix
from reducers.reducer import Searchable, State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Layout

Graph = Literal["spatial", "cosine"]


def spatial_graph(pos: Tensor, grid: tuple[int, int]) -> Tensor:
    """The graph of the eight neighbours on the patch grid, D^-1/2 G D^-1/2 with the degrees of the whole grid.

    pos (B, L): original patches, -1 for tokens that are none and so have no neighbour -> (B, L, L), float32
    """
    height, width = grid
    row, column = pos.div(max(width, 1), rounding_mode="floor"), pos % max(width, 1)
    near = ((row[:, :, None] - row[:, None]).abs() <= 1) & ((column[:, :, None] - column[:, None]).abs() <= 1)
    near = near & (pos[:, :, None] != pos[:, None]) & (pos >= 0)[:, :, None] & (pos >= 0)[:, None]
    rows = 1 + (row > 0).long() + (row < height - 1).long()
    columns = 1 + (column > 0).long() + (column < width - 1).long()
    degree = (rows * columns - 1).clamp(min=1).to(torch.float32)
    return near / (degree[:, :, None] * degree[:, None]).sqrt()


def cosine_graph(x: Tensor, valid: Tensor, *, neighbours: int) -> Tensor:
    """The graph that joins each token to its most similar ones, made symmetric, D^-1/2 G D^-1/2. (B, L, L)

    x (B, L, D), valid (B, L): which tokens take part.
    """
    normed = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        alike = normed @ normed.transpose(1, 2)
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    pair = valid[:, :, None] & valid[:, None] & ~own
    nearest = alike.masked_fill(~pair, -torch.inf).topk(min(neighbours, x.shape[1]), dim=2).indices
    joined = torch.zeros_like(pair).scatter(2, nearest, 1) & pair
    joined = joined | joined.transpose(1, 2)
    degree = joined.sum(2).clamp(min=1).to(alike.dtype)
    return joined / (degree[:, :, None] * degree[:, None]).sqrt()


def token_rank(attention: Tensor) -> Tensor:
    """How little is lost with a token: its attention to itself times that it receives, each the largest over heads.

    attention (B, H, L, L): rows are queries -> (B, L). Low ranks propagate and go.
    """
    itself = attention.diagonal(dim1=2, dim2=3).amax(dim=1)
    return itself * attention.sum(dim=2).amax(dim=1)


def sparsified(attention: Tensor, layout: Layout, share: Fraction) -> Tensor:
    """The attention with all but the largest ``share`` of its T x T entries set to 0, image by image and head by head.

    attention (B, H, L, L), the same out. The number of entries rounds down, one at least; of entries as large as the
    last one that stays, all stay [D]. What stays is not renormalised.
    """
    if layout.longest == 0:  # every image has finished
        return attention
    flat = attention.detach().flatten(2)
    if layout.uniform is not None:
        entries = flat.shape[2]
        least = flat.kthvalue(entries + 1 - max(1, entries * share.numerator // share.denominator), dim=2).values
    else:
        entries_each = layout.lengths**2
        last = (entries_each * share.numerator // share.denominator).clamp(min=1) - 1
        ranked = flat.sort(dim=2, descending=True).values
        least = ranked.gather(2, last[:, None, None].expand(-1, flat.shape[1], -1)).squeeze(2)
    return attention * (attention.detach() >= least[..., None, None])


@register("gtp")
class GTP(TokenReducer):
    """Remove the tokens of lowest rank; each first adds ``alpha`` times its features to those of its neighbours.

    x_kept += alpha G[kept, gone] x_gone, and likewise the tokens' scales (their size here), whose logarithm is added to
    later attention. A gone token's neighbours may be gone as well: then its features are lost. Acts after the attention
    residual. The count is fixed.

    Args:
        budget: ``Drop(P)`` in every block is the authors' setting; ``Ratio`` rounds up what stays.
        alpha: share of its features that a removed token hands on.
        graph: ``spatial``: the eight neighbours on the grid of original patches; ``cosine``: each token's eight most
            similar ones, among the tokens at hand, not among the initial ones as published [D].
        theta: of each head's attention in the block only this share, the largest entries, is used, and the rest set to
            0 without renormalisation; at 1 nothing is. Ranks are told before that, for many entries of a sparse
            diagonal are 0 and would rank alike [D]. Sparsified attention is not fused, and so is slower; it changes
            what the block computes even where no token goes, and needs to be first in a stack.
    """

    summary = "remove tokens after passing their features on to their neighbours"
    source = "Xu et al., WACV 2024 (arXiv 2311.03035)"
    traits = Traits(needs_token_keys=True)
    searchable: ClassVar[Searchable] = {"alpha": (0.2, 0.1, 0.4), "graph": ("spatial", "cosine")}

    def __init__(self, budget: Budget, *, alpha: float = 0.2, graph: Graph = "spatial", theta: float = 1.0) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "GTP")
        self.alpha = checked_share(alpha, "GTP(alpha=…)")
        self.theta = checked_share(theta, "GTP(theta=…)", above=True)
        self.graph = checked_choice(graph, Graph, "GTP(graph=…)")
        self.traits = replace(self.traits, uses_positions=graph == "spatial")

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "ceil")
        stays = counts.keep_all
        if stays and self.theta == 1:
            return None
        attention = signals.attention()
        if self.theta < 1:
            share = Fraction(str(self.theta)).limit_denominator(10**6)
            signals.attend_with(sparsified(attention, layout, share))
        if stays:
            return None
        attention, x = attention.detach(), signals.output()
        with torch.no_grad():
            keep = keep_highest(layout, layout.unpad(token_rank(attention)), counts)
            assert keep is not None
            if self.graph == "spatial":
                graph = spatial_graph(layout.pad(signals.positions(), fill=-1), state.grid)
            else:
                graph = cosine_graph(layout.pad(x.detach()), layout.pad(~layout.is_prefix), neighbours=8)
            gone = layout.pad(keep.destination < 0) & layout.valid  # (B, L)
            passed = keep.new.pad(keep.apply(layout.unpad(self.alpha * graph * gone[:, None])))  # (B, M, L)
            itself = torch.eye(layout.longest, dtype=passed.dtype, device=passed.device)[layout.row_index]
            weights = passed + keep.new.pad(keep.apply(itself))
            most = counts.left.most if counts.alike is not None else layout.longest
            movers = gone.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]  # (B, P)
            passed = passed.gather(2, movers[:, None].expand(-1, passed.shape[1], -1)).to(x.dtype)
        moved = layout.pad(x).gather(1, movers[..., None].expand(-1, -1, x.shape[1]))
        features = keep.apply(x) + keep.new.unpad(passed @ moved)
        if signals.counting:
            reduces = counts.busy
            kept = counts.each.double() + layout.prefix
            signals.spend(reduces * kept * (layout.lengths - kept) * x.shape[1])
            if self.graph == "cosine":
                signals.spend(reduces * layout.lengths.double() ** 2 * x.shape[1])
        return Decision(Mix(layout, keep.new, weights, keep.rows), features, proportional=True)
