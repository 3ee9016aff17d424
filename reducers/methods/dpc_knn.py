"""DPC-KNN: cluster by density peaks, merge each cluster (Du et al., 2016; as a token reducer Zeng et al., CVPR 2022,
and Haurum et al., ICCVW 2023).

Density of a token: how near its k nearest neighbours are. Centres: tokens that are dense and far from any denser one.
The members of a cluster weigh alike, or by a weight that is learned for each token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from reducers.budget import Budget, checked_budget
from reducers.checks import checked_choice, checked_whole
from reducers.decision import Decision
from reducers.kit.clustering import Site, density_peaks, labels_of, merge_labels, nearest_centre, squared_distances
from reducers.kit.selection import keep_count
from reducers.reducer import Searchable, State, TokenReducer
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Layout

Weights = Literal["equal", "learned"]


def learned_weights(logits: Tensor, layout: Layout) -> Tensor:
    """exp of one number a token, over the largest of its image, so that nothing overflows.
    (T,) -> (T,), at least float32

    A cluster's mean is the same whatever all its weights are multiplied by. The authors take the exponential as it is,
    and add 1e-6 to the denominator; that is left out [D].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    padded = layout.pad_patches(logits, fill=torch.finfo(logits.dtype).min)
    largest = padded.detach().amax(dim=1)
    return (logits - largest[layout.row_image]).masked_fill(layout.is_prefix, 0).exp()


@register("dpc_knn")
class DPCKNN(TokenReducer):
    """Cluster the patch tokens by density peaks and replace each cluster by its mean.

    Distances are Euclidean between features, over the square root of their width. Every token joins its nearest centre;
    a centre owns itself. Later attention is not weighted by size. The count is fixed.

    Args:
        budget: clusters left; ``Ratio`` rounds down.
        neighbours: k of the density: how many nearest tokens it is taken over.
        weights: ``equal``: members weigh alike, nothing is learned, and it works off the shelf. ``learned``, the
            published form: each token weighs exp(w x), with w (D) learned at each block, so it must be trained; no
            gradient goes through the clustering. The authors add a bias, which cancels in the mean [D].
        site: ``attention``: after the attention residual, where most methods act, so that a comparison is one of
            choices; ``input`` is the published place, before the block.
    """

    summary = "cluster by density peaks, merge each cluster"
    source = "Du et al., 2016; Zeng et al., CVPR 2022 (arXiv 2204.08680); Haurum et al., ICCVW 2023"
    trained_as = "learned weights: by the task loss, 30 epochs from DeiT in Haurum et al.'s benchmark"
    searchable: ClassVar[Searchable] = {"neighbours": (5, 3, 10), "site": ("attention", "input")}

    def __init__(
        self, budget: Budget, *, neighbours: int = 5, weights: Weights = "equal", site: Site = "attention"
    ) -> None:
        super().__init__()
        self.budget = checked_budget(budget, "DPCKNN")
        self.neighbours = checked_whole(neighbours, "DPCKNN(neighbours=…)", least=1)
        self.weights = checked_choice(weights, Weights, "DPCKNN(weights=…)")
        self.weighers = nn.ModuleDict()  # by block
        self.site = checked_choice(site, Site, "DPCKNN(site=…)")  # type: ignore[assignment]
        self.traits = replace(self.traits, trained=self.weights == "learned")

    def join(self, host: Any, blocks: tuple[int, ...]) -> None:
        if self.weights == "learned":  # else it has no parameters, and any model will do
            super().join(host, blocks)

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """A linear layer for each block."""
        self.weighers = nn.ModuleDict({str(block): nn.Linear(host.width, 1, bias=False) for block in blocks})

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        counts = keep_count(layout, self.budget, state, "floor")
        if counts.keep_all:
            return None
        x, valid = signals.output(), layout.valid_patches
        with torch.no_grad():
            squared = squared_distances(layout.pad_patches(x), valid) / x.shape[1]
            centre = density_peaks(squared, valid, counts.each, neighbours=self.neighbours)
            label = labels_of(nearest_centre(squared, centre), centre)
        if self.weights == "learned":
            weight = learned_weights(self.weighers[str(state.block)](x).squeeze(1), layout)
        else:
            weight = torch.ones_like(signals.size)
        merge = merge_labels(layout, label, counts, weight)
        if signals.counting:
            patches = layout.patches.double()
            weighers = patches * (self.weights == "learned")
            signals.spend(counts.busy * (patches**2 + patches + weighers) * x.shape[1])  # distances, means
        return Decision(merge)
