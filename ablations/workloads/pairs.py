"""Digit pairs: three or four handwritten digits among pieces of others; the label is the digit shown twice.

No single place decides. Every digit has to be read before it is known which two belong together, so a method that drops
tokens early has to choose among more of them than it may keep, and some scenes need more of them than others. Drawn,
like the cluttered digits (``digits``), from the real 8 x 8 digits inside scikit-learn, by integer arithmetic
and numpy's frozen ``RandomState`` stream: the same bits on every machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ablations.models.digits import CANVAS, CLASSES
from ablations.workloads.digits import Scene, Split, resize, shear, source_digits

VERSION = 1  # part of every data digest: raise it whenever a single pixel of any scene changes
CROWDED = {"train": 2, "test": 5}  # one scene in so many shows two digits beside the pair, the others show one
MAX_CLUTTER = 4  # pieces of other digits
DIGIT_SIZES = (18, 23)  # pixels, inclusive
PIECE_SIZES = (7, 12)  # pixels, inclusive
GAP = 1  # pixels at least between the boxes of two digits

_SET = 2  # of the random stream: apart from that of the cluttered digits
_SPLIT_IDS = {"train": 0, "test": 1}
_SOURCE = 8  # load_digits images are 8 x 8
_TRIES = 20  # places drawn for a digit before all of them are placed anew
_PIECE_TRIES = 6  # places drawn for a piece of clutter before it is left out
_MASK_LEVEL = 64  # of 255: a pixel this bright belongs to a digit

Box = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass(frozen=True)
class PairScene(Scene):
    """A scene whose mask covers both digits of the pair, for they decide the label."""

    shown: np.ndarray  # (64, 64) uint8: the class of the digit that a pixel belongs to, CLASSES where it is of none


@functools.cache
def _by_class(split: Split) -> tuple[np.ndarray, ...]:
    labels = source_digits(split)[1]
    return tuple(np.flatnonzero(labels == label) for label in range(CLASSES))


def _near(one: Box, other: Box) -> bool:
    return one[0] < other[2] + GAP and other[0] < one[2] + GAP and one[1] < other[3] + GAP and other[1] < one[3] + GAP


def _centre_inside(piece: Box, box: Box) -> bool:
    return 2 * box[0] < piece[0] + piece[2] < 2 * box[2] and 2 * box[1] < piece[1] + piece[3] < 2 * box[3]


def _places(height: int, width: int, count: int, random: np.random.RandomState) -> list[Box]:
    """``count`` places of a box on the canvas."""
    tops = random.randint(0, CANVAS - height + 1, size=count).tolist()
    lefts = random.randint(0, CANVAS - width + 1, size=count).tolist()
    return [(top, left, top + height, left + width) for top, left in zip(tops, lefts, strict=True)]


def _layout(count: int, random: np.random.RandomState) -> list[Box]:
    """Boxes of ``count`` digits, ``GAP`` apart; where one finds no place, sizes and places of all are drawn anew."""
    while True:
        sizes = random.randint(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1, size=(count, 1))
        shapes = np.clip(sizes + random.randint(-2, 3, size=(count, 2)), *DIGIT_SIZES)
        boxes: list[Box] = []
        for height, width in shapes.tolist():
            tried = _places(height, width, _TRIES, random)
            free = next((box for box in tried if not any(_near(box, other) for other in boxes)), None)
            if free is None:
                break
            boxes.append(free)
        if len(boxes) == count:
            return boxes


def render(split: Split, index: int, *, seed: int = 0, crowded: int | None = None) -> PairScene:
    """Draw scene number ``index`` of a split: of the test split, every ten scenes in turn have the ten labels once.

    Digits of the test split are of other writers than those of the train split. The two of a pair are two pictures, and
    each digit beside them is of a class of its own. ``crowded`` takes the place of the split's ``CROWDED``.
    """
    if split not in _SPLIT_IDS:
        raise ValueError(f"unknown split {split!r}: the digit pairs have 'train' and 'test'")
    images, labels = source_digits(split)
    pools = _by_class(split)
    random = np.random.RandomState([_SET, VERSION, _SPLIT_IDS[split], seed, index])
    classes = random.permutation(CLASSES).tolist()
    if split == "test":
        classes.remove(index % CLASSES)
        classes.insert(0, index % CLASSES)
    crowded = CROWDED[split] if crowded is None else crowded
    once = 2 if random.randint(crowded) == crowded - 1 else 1
    chosen = random.choice(pools[classes[0]], 2, replace=False).tolist()
    chosen += [int(random.choice(pools[label])) for label in classes[1 : 1 + once]]

    boxes = _layout(len(chosen), random)
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    shown = np.full((CANVAS, CANVAS), CLASSES, dtype=np.uint8)
    for number, (top, left, bottom, right) in zip(chosen, boxes, strict=True):
        digit = shear(resize(images[number], bottom - top, right - left), random.randint(-64, 65))
        canvas[top:bottom, left:right] = digit
        shown[top:bottom, left:right][digit >= _MASK_LEVEL] = labels[number]

    clutter = 0
    for _ in range(random.randint(0, MAX_CLUTTER + 1)):
        other = images[random.randint(len(labels))]
        cut = random.randint(4, 6)  # a piece is a 4 x 4 or 5 x 5 cut of another digit's 8 x 8
        row, column = random.randint(0, _SOURCE - cut + 1, size=2)
        height, width = random.randint(PIECE_SIZES[0], PIECE_SIZES[1] + 1, size=2).tolist()
        piece = resize(other[row : row + cut, column : column + cut], height, width)
        places = _places(height, width, _PIECE_TRIES, random)
        free = [place for place in places if not any(_centre_inside(place, box) for box in boxes)]
        if free:  # clutter may touch a digit, but a piece in its middle would make it another one
            top, left, bottom, right = free[0]
            np.maximum(canvas[top:bottom, left:right], piece, out=canvas[top:bottom, left:right])
            clutter += 1
    label = int(classes[0])
    return PairScene(canvas, shown == label, label, clutter, shown)


def shown_patches(shown: np.ndarray, patch: int) -> np.ndarray:
    """What each patch shows: (..., S, S) of ``PairScene.shown`` -> (..., (S / patch)^2) int64 in raster order, the
    class that most pixels of digits in it have, CLASSES where there is none.
    """
    *batch, height, width = shown.shape
    grid = shown.reshape(*batch, height // patch, patch, width // patch, patch)
    pixels = np.moveaxis(grid, -2, -3).reshape(*batch, -1, patch * patch)
    counts = np.stack([(pixels == label).sum(axis=-1) for label in range(CLASSES)], axis=-1)
    found: np.ndarray = np.where(counts.any(axis=-1), counts.argmax(axis=-1), CLASSES)
    return found
