"""What every figure is given and gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.style import Look


@dataclass(frozen=True)
class Sample:
    """One thumbnail: which image it is, its pixels, and the grid of patches on it."""

    image: str
    row: int  # of the per-image tables
    pixels: np.ndarray  # (H, W, 3) uint8
    grid: tuple[int, int]  # rows, columns of patches


@dataclass(frozen=True)
class Drawn:
    """A finished figure with what a reader needs beside it; ``data``: the numbers drawn, where no table has them."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame | None = None


@dataclass(frozen=True)
class Scene:
    """What all figures of one setting share."""

    images: Mapping[str, pd.DataFrame]  # per-image tables by trial key
    looks: Mapping[str, Look]
    subtitle: str
    pictures: Sequence[Sample] = ()
    model: str = ""
    imagenet: bool = False  # the data and classes of the published tables
    patches: int | None = None  # patches of an image, where the run says it
    count: int = 0  # images
