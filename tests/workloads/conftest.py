"""Small image trees made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ablations.workloads.base import Workload
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.preprocess import Preprocess

WNIDS = ("n01440764", "n02102040", "n03888257")  # ImageNet-1k classes 0, 217 and 701
WNID_INDICES = (0, 217, 701)

MakeTree = Callable[..., Path]
Open = Callable[..., Workload]


def noise(size: tuple[int, int], seed: int, mode: str = "RGB") -> Image.Image:
    """A picture of smooth noise, so that JPEG and resizing change it only a little."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Make a folder of class folders, each with ``count`` PNG images of the given size."""

    def make(
        classes: tuple[str, ...] = WNIDS,
        *,
        count: int = 3,
        size: tuple[int, int] = (40, 36),
        name: str = "data",
    ) -> Path:
        root = tmp_path / name
        for number, cls in enumerate(classes):
            (root / cls).mkdir(parents=True)
            for image in range(count):
                noise(size, seed=100 * number + image).save(root / cls / f"image_{image:02d}.png")
        return root

    return make


@pytest.fixture
def preprocess() -> Preprocess:
    """A small model's preprocessing: 32 x 32 crops of images resized to 35."""
    return Preprocess(
        size=(32, 32),
        channels=3,
        crop_pct=0.9,
        crop_mode="center",
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def folder_opener(preprocess: Preprocess, *, strict: bool) -> Open:
    """Opens a folder under an ImageNet head; what differs from that is said by name."""

    def open_with(root: Path, **changes: Any) -> Workload:
        options = {"head": 1000, "preprocess": preprocess, "limit": None, "strict": strict, "cache": None}
        return open_image_folder(str(root), **{**options, **changes})

    return open_with


@pytest.fixture
def open_folder(preprocess: Preprocess) -> Open:
    return folder_opener(preprocess, strict=True)
