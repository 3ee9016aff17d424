"""DPC-KNN: cluster by density peaks, merge each cluster (Du et al., 2016; as a token reducer Zeng et al., CVPR 2022,
and Haurum et al., ICCVW 2023; methods 13).

Density of a token: how near its k nearest neighbours are. Centres: tokens that are dense and far from any denser one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reducers.base import Decision, State, TokenReducer
from reducers.budget import Budget, checked_budget
from reducers.errors import ReducerError
from reducers.methods.clusters import (
    Site,
    busy,
    checked_choice,
    count_each,
    keeps_all,
    labels_of,
    merge_labels,
    nearest_centre,
    squared_distances,
)
from reducers.methods.topk import first_of, keep_count
from reducers.registry import register
from reducers.signals import Signals


def log_density(squared: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """Minus the mean squared distance to the k nearest tokens, the token itself included. (B, N, N) -> (B, N)

    The density is the exponential of it; the logarithm ranks alike and cannot underflow. Of fewer than k tokens, all
    count. Padding gets -inf.
    """
    nearest = squared.topk(min(neighbours, squared.shape[2]), dim=2, largest=False).values
    there = nearest.isfinite()
    mean = nearest.masked_fill(~there, 0).sum(2) / there.sum(2).clamp(min=1)
    return (-mean).masked_fill(~valid, -torch.inf)


def density_peaks(squared: Tensor, valid: Tensor, count: Tensor, *, neighbours: int) -> Tensor:
    """The ``count`` (B,) tokens with the largest density x distance to the nearest denser token, (B, N) bool.

    squared (B, N, N): squared distances. Of equally dense tokens the first counts as denser [D: the authors add noise
    instead]; the densest of all gets the largest distance there is. Products are compared by their logarithms.
    """
    density = log_density(squared, valid, neighbours)
    place = torch.arange(squared.shape[1], device=squared.device)
    ours, theirs = density[:, :, None], density[:, None, :]
    denser = (theirs > ours) | ((theirs == ours) & (place < place[:, None]))
    denser = denser & valid[:, None, :]
    gap = squared.masked_fill(~denser, torch.inf).amin(dim=2)
    widest = squared.masked_fill(squared.isinf(), 0).amax(dim=(1, 2))
    gap = torch.where(denser.any(dim=2), gap, widest[:, None])
    peak = (density + 0.5 * gap.log()).masked_fill(~valid, -torch.inf)
    return first_of(peak.sort(dim=1, descending=True, stable=True).indices, count) & valid


@register("dpc_knn")
class DPCKNN(TokenReducer):
    """Cluster the patch tokens by density peaks and replace each cluster by its mean.

    Distances are Euclidean between features, over the square root of their width. Every token joins its nearest
    centre; a centre owns itself. Members weigh alike (the parameter-free form; the published one learns a weight for
    each token and so must be trained). ``Ratio`` rounds down. Later attention is not weighted by size. The
    count is fixed. Acts after the attention residual, where most methods do, so that a comparison is one of choices;
    ``site="input"`` is the published place, before the block.
    """

    summary = "cluster by density peaks, merge each cluster"
    source = "Du et al., 2016; Zeng et al., CVPR 2022 (arXiv 2204.08680); Haurum et al., ICCVW 2023"

    def __init__(self, budget: Budget, *, neighbours: int = 5, site: Site = "attention") -> None:
        super().__init__()
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ReducerError(f"DPCKNN(neighbours={neighbours!r}) must be a whole number, at least 1")
        self.budget = checked_budget(budget, "DPCKNN")
        self.neighbours = neighbours
        self.site = checked_choice(site, Site, "DPCKNN(site=…)")  # type: ignore[assignment,misc]  # of this instance

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        count = keep_count(layout, self.budget, state, "floor")
        if keeps_all(layout, count):
            return None
        x, valid = signals.output(), layout.valid_patches
        with torch.no_grad():
            squared = squared_distances(layout.pad_patches(x), valid) / x.shape[1]
            centre = density_peaks(squared, valid, count_each(layout, count), neighbours=self.neighbours)
            label = labels_of(nearest_centre(squared, centre), centre)
            merge = merge_labels(layout, label, count, torch.ones_like(signals.size))
        if signals.counting:
            patches = layout.patches.double()
            signals.spend(busy(layout, count) * (patches**2 + patches) * x.shape[1])  # distances, means
        return Decision(merge)
