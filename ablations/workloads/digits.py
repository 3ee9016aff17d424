"""Cluttered digits: one handwritten digit somewhere on a canvas, among pieces of other digits.

The classic test of adaptive attention (Mnih et al., *Recurrent Models of Visual Attention*, 2014), drawn from the
real 8 x 8 handwritten digits that ship inside scikit-learn, so nothing is downloaded. Each scene knows what no
photograph tells: which pixels belong to the digit (its mask) and how much clutter surrounds it.

Bit-reproducible on every machine: all arithmetic is on integers (fixed-point bilinear resizing), and all
randomness comes from numpy's frozen ``RandomState`` stream, seeded by (version, split, seed, index).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ablations.models.digits import CANVAS

VERSION = 1  # part of every data digest: raise it whenever a single pixel of any scene changes
MAX_CLUTTER = 9  # pieces of other digits
DIGIT_SIZES = (22, 40)  # pixels, inclusive
PIECE_SIZES = (8, 18)  # pixels, inclusive

Split = Literal["train", "test"]
_SPLIT_IDS = {"train": 0, "test": 1}
_SOURCE = 8  # load_digits images are 8 x 8 with values 0..16
_TRIES = 6  # places drawn for a piece of clutter before it is left out
_MASK_LEVEL = 64  # of 255: a pixel this bright belongs to the digit
_HELD_OUT = 0.2  # the last contiguous fifth of load_digits: other writers than the rest


@dataclass(frozen=True)
class Scene:
    """One image and what is known of it."""

    image: np.ndarray  # (64, 64) uint8
    mask: np.ndarray  # (64, 64) bool: pixels of the digit
    label: int
    clutter: int  # pieces drawn around the digit, 0 .. MAX_CLUTTER


@functools.cache
def source_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The 8 x 8 digits of a split: images (n, 8, 8) int32 in 0..16 and labels (n,) int64."""
    from sklearn.datasets import load_digits  # slow to import, and only this workload needs it

    digits = load_digits()
    images = digits.images.astype(np.int32)
    labels = digits.target.astype(np.int64)
    cut = len(labels) - int(len(labels) * _HELD_OUT)
    part = slice(None, cut) if split == "train" else slice(cut, None)
    return images[part], labels[part]


@functools.cache
def _resize_weights(size: int, source: int) -> np.ndarray:
    """Bilinear resampling (half-pixel centres) as a (size, source) int64 matrix in 1/256 units; rows sum to 256."""
    weights = np.zeros((size, source), dtype=np.int64)
    for row in range(size):
        position = ((2 * row + 1) * source * 256 - 256 * size) // (2 * size)
        low, fraction = position >> 8, position & 255
        weights[row, min(max(low, 0), source - 1)] += 256 - fraction
        weights[row, min(max(low + 1, 0), source - 1)] += fraction
    return weights


def resize(source: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge a small image with values 0..16 to (height, width) uint8 with values 0..255."""
    rows = _resize_weights(height, source.shape[0])
    columns = _resize_weights(width, source.shape[1])
    fixed = rows @ source @ columns.T  # at most 16 * 256 * 256
    return ((fixed * 255) // (16 * 65536)).astype(np.uint8)


def shear(image: np.ndarray, shear: int) -> np.ndarray:
    """Slant an image: row y moves by shear / 256 pixels for each pixel above the middle; what leaves is cut."""
    height, width = image.shape
    shift = (shear * (height - 2 * np.arange(height))) >> 9
    columns = np.arange(width)[None, :] - shift[:, None]
    inside = (columns >= 0) & (columns < width)
    return np.where(inside, np.take_along_axis(image, np.clip(columns, 0, width - 1), axis=1), 0).astype(np.uint8)


def _place(height: int, width: int, random: np.random.RandomState) -> tuple[slice, slice]:
    top = random.randint(0, CANVAS - height + 1)
    left = random.randint(0, CANVAS - width + 1)
    return slice(top, top + height), slice(left, left + width)


def _centre_inside(piece: tuple[slice, slice], box: tuple[slice, slice]) -> bool:
    return all(2 * b.start < p.start + p.stop < 2 * b.stop for p, b in zip(piece, box, strict=True))


def render(split: Split, index: int, *, seed: int = 0, max_clutter: int = MAX_CLUTTER) -> Scene:
    """Draw scene number ``index`` of a split.

    The test split shows every held-out digit equally often (its number is ``index`` modulo their count); the train
    split draws digits at random and is endless. ``max_clutter`` lets training begin on plain scenes.
    """
    if split not in _SPLIT_IDS:
        raise ValueError(f"unknown split {split!r}: the cluttered digits have 'train' and 'test'")
    images, labels = source_digits(split)
    random = np.random.RandomState([VERSION, _SPLIT_IDS[split], seed, index])
    drawn = random.randint(len(labels))
    chosen = index % len(labels) if split == "test" else drawn

    size = random.randint(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1)
    height, width = np.clip(size + random.randint(-3, 4, size=2), *DIGIT_SIZES)
    digit = shear(resize(images[chosen], height, width), random.randint(-64, 65))
    box = _place(height, width, random)
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    canvas[box] = digit
    mask = canvas >= _MASK_LEVEL

    clutter = 0
    for _ in range(random.randint(0, max_clutter + 1)):
        other = images[random.randint(len(labels))]
        cut = random.randint(4, 6)  # a piece is a 4 x 4 or 5 x 5 cut of another digit's 8 x 8
        top, left = random.randint(0, _SOURCE - cut + 1, size=2)
        height, width = random.randint(PIECE_SIZES[0], PIECE_SIZES[1] + 1, size=2)
        piece = resize(other[top : top + cut, left : left + cut], height, width)
        places = [_place(height, width, random) for _ in range(_TRIES)]
        free = [place for place in places if not _centre_inside(place, box)]
        if free:  # clutter may touch the digit, but a piece in its middle would make it another digit
            np.maximum(canvas[free[0]], piece, out=canvas[free[0]])
            clutter += 1
    return Scene(canvas, mask, int(labels[chosen]), clutter)


def mask_patches(mask: np.ndarray, patch: int) -> np.ndarray:
    """Which patches hold at least one pixel of the digit: (..., S, S) bool -> (..., (S / patch)^2) bool,
    raster order.
    """
    *batch, height, width = mask.shape
    grid = mask.reshape(*batch, height // patch, patch, width // patch, patch)
    return grid.any(axis=(-3, -1)).reshape(*batch, -1)
