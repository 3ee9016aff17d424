"""Which patches survive, image by image: the bits that trials left, and how far two trials agree about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Bits = NDArray[np.bool_]


@runtime_checkable
class WithBits(Protocol):
    """Per-image tables that read their bits on their own."""

    def kept(self, key: str) -> NDArray[np.uint8] | None: ...


def packed(images: Mapping[str, pd.DataFrame], key: str) -> NDArray[np.uint8] | None:
    """(images, blocks, bytes): the packed bits of a trial; None where it left none."""
    if isinstance(images, WithBits):
        return images.kept(key)
    table = images.get(key)
    if table is None or "kept" not in table or table.empty:
        return None
    return np.stack([[np.frombuffer(block, dtype=np.uint8) for block in row] for row in table["kept"]])


def last_kept(images: Mapping[str, pd.DataFrame], key: str) -> tuple[Bits, int] | None:
    """(images, 8 x bytes) bool in the order of the image names: patches with a token of their own after the last
    block; and the number of patches as far as this trial shows it: up to the last that any image kept in any block
    (the bits after the last patch fill a byte). A trial that reduces in the first block may show too few.
    """
    bits = packed(images, key)
    if bits is None or key not in images:
        return None
    ever = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits, axis=(0, 1))))
    order = np.argsort(images[key]["image"].to_numpy(dtype=str), kind="stable")
    patches = int(ever[-1]) + 1 if len(ever) else 0
    return np.unpackbits(bits[order, -1], axis=1).astype(bool), patches


def overlap(first: Bits, second: Bits) -> dict[str, float]:
    """How far two choices agree, means over images: ``jaccard`` (patches both keep / patches either keeps),
    ``chance`` (what two independent random choices of as many patches would have), and ``kappa`` (Cohen, 1960:
    agreement beyond chance, 0 is chance and 1 the same choice; images in which a side keeps all or none do not count).
    """
    n = first.shape[1]
    a, b = first.sum(axis=1).astype(float), second.sum(axis=1).astype(float)
    both = (first & second).sum(axis=1).astype(float)
    union = a + b - both
    random = a * b / n  # expected size of the intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        jaccard, chance = both / union, random / (a + b - random)
        observed = 1 - (a + b - 2 * both) / n
        expected = (a * b + (n - a) * (n - b)) / n**2
        kappa = (observed - expected) / (1 - expected)
    decided = (a > 0) & (a < n) & (b > 0) & (b < n)
    mean = float(kappa[decided].mean()) if decided.any() else float("nan")
    some = union > 0
    return {
        "jaccard": float(jaccard[some].mean()) if some.any() else float("nan"),
        "chance": float(chance[some].mean()) if some.any() else float("nan"),
        "kappa": mean,
    }
