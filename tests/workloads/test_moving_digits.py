"""The moving digits: bit-reproducible clips in which the digit moves as its label says and is whole in every frame."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from ablations.workloads import moving_digits
from ablations.workloads.digits import source_digits
from ablations.workloads.moving_digits import CANVAS, DIGIT_SIZES, DIRECTIONS, FRAMES, MAX_CLUTTER, render


def steps_of(masks: np.ndarray) -> set[tuple[int, int]]:
    """By how much the torus rolls from each frame to the next, of all steps up to 3 pixels; fails where it does not."""
    tried = list(itertools.product(range(-3, 4), repeat=2))
    return {
        next(step for step in tried if np.array_equal(np.roll(before, step, axis=(0, 1)), after))
        for before, after in itertools.pairwise(masks)
    }


def test_clips_are_the_same_bits_on_every_machine() -> None:
    scenes = [render(split, index, seed=3) for split in ("test", "train") for index in (0, 1, 959)]
    content = hashlib.sha256()
    for scene in scenes:
        content.update(scene.frames.tobytes() + scene.masks.tobytes())
        content.update(bytes([scene.direction, scene.digit, scene.clutter]))
    assert content.hexdigest()[:16] == "e89b979a1e9a6fa2", (
        "a changed clip needs a new moving_digits.VERSION and new weights"
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_digit_is_whole_in_every_frame_and_moves_as_its_label_says(split: str) -> None:
    speeds = set()
    for index in range(12):
        scene = render(split, index)  # type: ignore[arg-type]
        assert scene.frames.shape == scene.masks.shape == (FRAMES, CANVAS, CANVAS)
        assert scene.frames.dtype == np.uint8 and scene.masks.dtype == bool
        assert (scene.frames[scene.masks] >= 64).all() and scene.masks[0].sum() > 40
        (step,) = steps_of(scene.masks)
        speed = max(map(abs, step))
        assert step == tuple(speed * axis for axis in DIRECTIONS[scene.direction])
        speeds.add(speed)
        for axis in (1, 2):  # on the torus its extent is that of a digit
            empty = ~scene.masks[0].any(axis=axis - 1)
            gaps = np.diff(np.flatnonzero(np.tile(~empty, 2))) - 1
            assert CANVAS - gaps.max() <= DIGIT_SIZES[1]
    assert speeds == {2, 3}


def test_pieces_move_their_own_ways() -> None:
    """What is no digit moves as well, and seldom with the digit."""
    alone, along = render("train", 5, max_clutter=0), 0
    assert alone.clutter == 0 and (alone.frames.max(axis=0) > 0).any()
    counts: Counter[int] = Counter()
    for index in range(80):
        scene = render("train", index)
        counts[scene.clutter] += 1
        if scene.clutter == 0:
            continue
        (step,) = steps_of(scene.masks[:2])
        rolled = np.roll(scene.frames[0], np.multiply(step, FRAMES - 1), axis=(0, 1))
        along += np.array_equal(rolled, scene.frames[-1])
    assert set(counts) == set(range(MAX_CLUTTER + 1)) and min(counts.values()) >= 5
    assert along <= 4, "all of its pieces go the digit's way"


def test_no_piece_rides_in_the_middle_of_the_digit() -> None:
    inside = moving_digits._frames_inside
    still = np.tile([[40, 40]], (FRAMES, 1))
    shape, piece = np.array([20, 20]), np.array([10, 8])
    assert inside(still, piece, still, shape) == FRAMES
    assert inside((still + 20) % CANVAS, piece, still, shape) == 0  # beside it, beyond the border
    assert inside((still + [8, 12]) % CANVAS, piece, still, shape) == FRAMES  # over the border
    crossing = (still + np.arange(FRAMES)[:, None] * [0, 3]) % CANVAS
    slow = sum(0 < 3 * t + 4 < 20 for t in range(FRAMES))
    assert inside(crossing, piece, still, shape) == slow == 6


def test_every_label_is_shown_equally_often_by_held_out_digits_and_seeds_give_other_clips() -> None:
    scenes = [render("test", index) for index in range(80)]
    assert Counter((scene.direction, scene.digit) for scene in scenes) == {
        (direction, digit): 1 for direction in range(8) for digit in range(10)
    }
    assert [scene.direction for scene in scenes] == [*range(8)] * 10
    assert not np.array_equal(render("test", 4).frames, render("test", 4, seed=1).frames)
    assert not np.array_equal(render("test", 0).masks, render("test", 80).masks)
    with pytest.raises(ValueError, match="'train' and 'test'"):
        render("val", 0)  # type: ignore[arg-type]


def test_the_digit_is_one_of_its_split_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of a split that has one picture of each class show that picture."""
    images, labels = source_digits("test")
    first = np.array([np.flatnonzero(labels == digit)[0] for digit in range(10)])
    asked = []

    def few(split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(split)
        return images[first], labels[first]

    seen = []
    resize = moving_digits.resize
    monkeypatch.setattr(moving_digits, "source_digits", few)
    monkeypatch.setattr(moving_digits, "resize", lambda image, *size: seen.append(image) or resize(image, *size))
    for index in (0, 8, 16, 79):
        seen.clear()
        scene = render("test", index)
        assert np.array_equal(seen[0], images[first[scene.digit]])
    assert set(asked) == {"test"}


def test_where_the_digit_is_does_not_tell_its_direction() -> None:
    """In no frame: the corner lies anywhere on the torus with equal chance, for every direction."""
    corners = np.zeros((8, FRAMES, 2, 4))
    random = np.random.RandomState(0)
    for direction in range(8):
        for _ in range(400):
            path = moving_digits._path(direction, random)
            for axis in (0, 1):
                corners[direction, np.arange(FRAMES), axis, path[:, axis] * 4 // CANVAS] += 1
    assert corners.min() > 60 and corners.max() < 140  # of 100 in each quarter
