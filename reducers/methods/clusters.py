"""What the clustering methods share: distances between an image's patches, and from labels to a merge.

Everything is batched over images and works on the padded patch view (B, N, …) with ``valid`` (B, N); every step has a
size that is known beforehand, so that nothing waits for the device where images are alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reducers.maps import Merge
from reducers.tokens import Layout

Site = Literal["input", "attention"]
Weights = Literal["attention", "equal"]


def keeps_all(layout: Layout, count: Tensor | int) -> bool:
    """No image has more patches than it may keep."""
    if isinstance(count, int):
        assert layout.uniform is not None
        return count >= layout.uniform[0] - layout.uniform[1]
    return bool((count >= layout.patches).all())


def count_each(layout: Layout, count: Tensor | int) -> Tensor:
    """The count of every image, (B,) int64."""
    if isinstance(count, int):
        return torch.full_like(layout.lengths, count)
    return count


def busy(layout: Layout, count: Tensor | int) -> Tensor:
    """(B,) float64: 1 for images that have something to reduce, 0 for those left as they are, which cost nothing."""
    return (count_each(layout, count) < layout.patches).double()


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


def labels_of(owner: Tensor, centre: Tensor) -> Tensor:
    """Owners (patch indices) as cluster numbers 0 … M - 1, in the order of the centres. (B, N) int64"""
    return (centre.long().cumsum(1) - 1).gather(1, owner)


def merge_labels(layout: Layout, label: Tensor, count: Tensor | int, weight: Tensor) -> Merge:
    """The patches of each cluster become one token, their mean by ``weight`` (T,); prefix tokens stay.

    label (B, N): cluster numbers 0 … M - 1 in each image, none of them empty; count: M of each image. The new tokens
    stand behind the prefix in the order of their numbers.
    """
    if layout.uniform is not None and isinstance(count, int):
        prefix = layout.uniform[1]
        new = Layout.alike(layout.images, prefix + count, prefix, label.device)
    else:
        lengths = layout.prefix + count
        new = Layout.ragged(lengths, layout.prefix)
    behind = layout.prefix[layout.row_image] + layout.spread(label, prefix=0)
    group = new.starts[layout.row_image] + torch.where(layout.is_prefix, layout.row_index, behind)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)
    sums = torch.zeros(new.rows, dtype=weight.dtype, device=weight.device).index_add_(0, group, weight)
    return Merge(layout, new, group, weight / sums[group])
