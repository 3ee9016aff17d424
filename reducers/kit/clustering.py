"""What the clustering methods share: distances between an image's patches, and from labels to a merge.

Everything is batched over images and works on the padded patch view (B, N, …) with ``valid`` (B, N); every step has a
size that is known beforehand, so that nothing waits for the device where images are alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reducers.kit.selection import first_of
from reducers.maps import Merge
from reducers.tokens import Counts, Layout

Site = Literal["input", "attention"]
Weights = Literal["attention", "equal"]


def squared_distances(x: Tensor, valid: Tensor) -> Tensor:
    """Squared Euclidean distances between the patches of each image; padding is infinitely far away.

    x (B, N, D), valid (B, N) -> (B, N, N), float32 or wider whatever the precision around it: the features are
    centred first, so that little is lost where tokens are alike.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid[..., None], 0)
    with torch.autocast(x.device.type, enabled=False):
        x = x - (x.sum(1) / valid.sum(1).clamp(min=1)[:, None])[:, None]
        norm = x.square().sum(-1)
        products = x @ x.transpose(1, 2)
        # alike both ways to the last bit, which a product need not be: of two tokens in a cluster neither is nearer
        squared = norm[:, :, None] + norm[:, None, :] - (products + products.transpose(1, 2))
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    squared = squared.clamp(min=0).masked_fill(own, 0)
    return squared.masked_fill(~(valid[:, :, None] & valid[:, None, :]), torch.inf)


def nearest_centre(distance: Tensor, centre: Tensor) -> Tensor:
    """For each patch the patch that is its nearest centre, of equally near ones the first; a centre owns itself.

    distance (B, N, N), centre (B, N) bool -> (B, N) int64
    """
    place = torch.arange(centre.shape[1], device=centre.device)
    return torch.where(centre, place, distance.masked_fill(~centre[:, None], torch.inf).argmin(dim=2))


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


def labels_of(owner: Tensor, centre: Tensor) -> Tensor:
    """Owners (patch indices) as cluster numbers 0 … M - 1, in the order of the centres. (B, N) int64"""
    return (centre.long().cumsum(1) - 1).gather(1, owner)


def merge_labels(layout: Layout, label: Tensor, counts: Counts, weight: Tensor) -> Merge:
    """The patches of each cluster become one token, their mean by ``weight`` (T,); prefix tokens stay.

    label (B, N): cluster numbers 0 … M - 1 in each image, none of them empty; counts: M of each image. The new tokens
    stand behind the prefix in the order of their numbers.
    """
    new = layout.leaving(counts)
    behind = layout.prefix[layout.row_image] + layout.spread(label, prefix=0)
    group = new.starts[layout.row_image] + torch.where(layout.is_prefix, layout.row_index, behind)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)
    sums = torch.zeros(new.rows, dtype=weight.dtype, device=weight.device).index_add_(0, group, weight)
    return Merge(layout, new, group, weight / sums[group])
