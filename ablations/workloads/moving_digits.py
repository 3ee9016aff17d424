"""Moving digits: a handwritten digit crosses a short clip among pieces of other digits, each with a motion of its own.

The label is the direction in which the digit moves. No single frame tells it, and neither does the motion of most
things in view: a model has to find the digit and follow it in time. Which digit it is makes a second label. Drawn, like
the cluttered digits (``digits``), from the real 8 x 8 digits inside scikit-learn, by integer arithmetic and numpy's
frozen ``RandomState`` stream: the same bits on every machine.

The canvas is a torus: what leaves it on one side comes in on the other in the same frame. So all of the digit is
visible in every frame, and it lies anywhere with equal chance in each, whatever its direction. If it had to stay inside
the borders, a digit that moves to the right would have to begin on the left, and one frame would tell the direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ablations.models.clips import CLIP_CANVAS as CANVAS
from ablations.models.clips import FRAMES
from ablations.models.digits import CLASSES
from ablations.workloads.digits import Split, resize, shear, source_digits

VERSION = 1  # part of every data digest: raise it whenever a single pixel of any clip changes
DIRECTIONS = (
    (0, 1),
    (1, 1),
    (1, 0),
    (1, -1),
    (0, -1),
    (-1, -1),
    (-1, 0),
    (-1, 1),
)  # (down, right), clockwise from right
SPEEDS = (2, 3)  # pixels a frame along each axis that moves, inclusive
MAX_CLUTTER = 5  # pieces of other digits
DIGIT_SIZES = (20, 24)  # pixels, inclusive
PIECE_SIZES = (8, 15)  # pixels, inclusive

_SET = 3  # of the random stream: apart from those of the other embedded scenes
_SPLIT_IDS = {"train": 0, "test": 1}
_SOURCE = 8  # load_digits images are 8 x 8
_TRIES = 6  # motions drawn for a piece of clutter before it is left out
_MASK_LEVEL = 64  # of 255: a pixel this bright belongs to the digit


@dataclass(frozen=True)
class MovingScene:
    """One clip and what is known of it."""

    frames: np.ndarray  # (FRAMES, CANVAS, CANVAS) uint8
    masks: np.ndarray  # (FRAMES, CANVAS, CANVAS) bool: pixels of the digit in each frame
    direction: int  # of the digit: index of DIRECTIONS
    digit: int  # which one it is, 0 .. 9
    clutter: int  # pieces drawn beside it, 0 .. MAX_CLUTTER


def _path(direction: int, random: np.random.RandomState) -> np.ndarray:
    """(FRAMES, 2) the top left corner of what moves in a direction, in each frame; the speed and start are drawn."""
    speed = random.randint(SPEEDS[0], SPEEDS[1] + 1)
    start = random.randint(0, CANVAS, size=2)
    steps = np.arange(FRAMES)[:, None] * speed * np.array(DIRECTIONS[direction])
    corners: np.ndarray = (start + steps) % CANVAS
    return corners


def _moved(picture: np.ndarray, path: np.ndarray) -> np.ndarray:
    """(FRAMES, CANVAS, CANVAS) a small picture in its place in each frame, black around it."""
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return np.stack([np.roll(canvas, corner, axis=(0, 1)) for corner in path.tolist()])


def _frames_inside(piece: np.ndarray, piece_shape: np.ndarray, digit: np.ndarray, digit_shape: np.ndarray) -> int:
    """In how many frames the centre of a piece lies within the digit's box."""
    off = (2 * piece + piece_shape - 2 * digit) % (2 * CANVAS)  # from the digit's corner, in half pixels
    return int(((off > 0) & (off < 2 * digit_shape)).all(axis=1).sum())


def render(split: Split, index: int, *, seed: int = 0, max_clutter: int = MAX_CLUTTER) -> MovingScene:
    """Draw clip number ``index`` of a split: of the test split, every 80 clips in turn have each pair of direction
    (``index`` modulo 8) and digit once.

    Digits of the test split are of other writers than those of the train split, which is endless. ``max_clutter`` lets
    training begin on plain clips.

    Raises:
        ValueError: there is no such split.
    """
    if split not in _SPLIT_IDS:
        raise ValueError(f"unknown split {split!r}: the moving digits have 'train' and 'test'")
    images, labels = source_digits(split)
    random = np.random.RandomState([_SET, VERSION, _SPLIT_IDS[split], seed, index])
    direction, digit = int(random.randint(len(DIRECTIONS))), int(random.randint(CLASSES))
    if split == "test":
        direction, digit = index % len(DIRECTIONS), index // len(DIRECTIONS) % CLASSES
    chosen = random.choice(np.flatnonzero(labels == digit))

    size = random.randint(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1)
    shape = np.clip(size + random.randint(-2, 3, size=2), *DIGIT_SIZES)
    path = _path(direction, random)
    frames = _moved(shear(resize(images[chosen], *shape.tolist()), random.randint(-64, 65)), path)
    masks = frames >= _MASK_LEVEL

    clutter = 0
    for _ in range(random.randint(0, max_clutter + 1)):
        other = images[random.randint(len(labels))]
        cut = random.randint(4, 6)  # a piece is a 4 x 4 or 5 x 5 cut of another digit's 8 x 8
        top, left = random.randint(0, _SOURCE - cut + 1, size=2)
        piece_shape = random.randint(PIECE_SIZES[0], PIECE_SIZES[1] + 1, size=2)
        piece = resize(other[top : top + cut, left : left + cut], *piece_shape.tolist())
        paths = [_path(int(random.randint(len(DIRECTIONS))), random) for _ in range(_TRIES)]
        free = [each for each in paths if 2 * _frames_inside(each, piece_shape, path, shape) <= FRAMES]
        if free:  # clutter may cross the digit, but a piece that rides in its middle would make it another digit
            np.maximum(frames, _moved(piece, free[0]), out=frames)
            clutter += 1
    return MovingScene(frames, masks, direction, digit, clutter)
