"""The embedded workloads, with nothing to download: digit pairs (``embedded``), before them cluttered digits
(``embedded:v1``), and clips of moving digits (``moving_digits``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from ablations.models.clips import DIRECTIONS
from ablations.models.digits import CLASSES, EMBEDDED, EMBEDDED_V1, MEAN, MOVING, STD
from ablations.workloads import digits, moving_digits, pairs
from ablations.workloads.base import CALIBRATION, Workload, data_digest

IMAGES = {EMBEDDED: 2400, EMBEDDED_V1: 2160, MOVING: 960}  # evaluated by default
SCENE_SEED = 18  # of the digit pairs that are evaluated: drawn after the recipe of their model was frozen
CLIP_SEED = 23  # of the moving digits that are evaluated


@functools.lru_cache(maxsize=2)  # drawing them takes seconds; nobody changes them
def embedded_workload(limit: int = IMAGES[EMBEDDED]) -> Workload:
    """The first ``limit`` scenes of digit pairs, with the mask of the two digits that decide and the clutter.

    A multiple of 10 shows every label equally often. The digits are of 360 held-out pictures: intervals over images do
    not know that a digit comes back in another scene, so treat small differences with care.
    """
    return _pairs(range(limit))


@functools.lru_cache(maxsize=2)
def calibration_scenes(limit: int, count: int = CALIBRATION) -> Workload:
    """``count`` scenes of digit pairs beyond the first ``limit``: to calibrate on without evaluating fewer."""
    return _pairs(range(limit, limit + count))


@functools.lru_cache(maxsize=2)
def first_workload(limit: int = IMAGES[EMBEDDED_V1]) -> Workload:
    """The first ``limit`` held-out scenes of cluttered digits, with the mask of each digit and its clutter level.

    A multiple of 360 shows every held-out digit equally often. There are only 360 of them, as above.
    """
    return _cluttered(range(limit))


@functools.lru_cache(maxsize=2)
def first_calibration_scenes(limit: int, count: int = CALIBRATION) -> Workload:
    """``count`` scenes of cluttered digits beyond the first ``limit``."""
    return _cluttered(range(limit, limit + count))


SCENES = (EMBEDDED, EMBEDDED_V1)  # images with the masks of what decides, and a train split of others
HEAD_SEED = 2  # of scenes for heads: the shipped weights were trained on those of seed 0, finetuning draws those of 1


@functools.lru_cache(maxsize=2)
def training_scenes(name: str, count: int) -> Workload:
    """``count`` scenes of a workload's train split with their masks, to fit a head on: never evaluated."""
    draw = digits.render if name == EMBEDDED_V1 else pairs.render
    scenes = [draw("train", index, seed=HEAD_SEED) for index in range(count)]
    return _workload(name, scenes, tuple(f"train/{HEAD_SEED}/{index}" for index in range(count)))


@functools.lru_cache(maxsize=2)
def moving_workload(limit: int = IMAGES[MOVING]) -> Workload:
    """The first ``limit`` held-out clips of moving digits: the direction as label, the digit as the second one, and the
    digit's mask in every frame.

    A multiple of 80 shows every direction of every digit equally often. The digits are of 359 held-out pictures.
    """
    return _moving(range(limit))


@functools.lru_cache(maxsize=2)
def moving_calibration_clips(limit: int, count: int = CALIBRATION) -> Workload:
    """``count`` clips of moving digits beyond the first ``limit``."""
    return _moving(range(limit, limit + count))


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    EMBEDDED: embedded_workload,
    EMBEDDED_V1: first_workload,
    MOVING: moving_workload,
}
CALIBRATIONS: dict[str, Callable[[int], Workload]] = {
    EMBEDDED: calibration_scenes,
    EMBEDDED_V1: first_calibration_scenes,
    MOVING: moving_calibration_clips,
}


def name_of(name: str, images: int, digest: str) -> str:
    """The workload that a record calls ``name``: before the digit pairs, the cluttered digits were ``embedded``."""
    if name == EMBEDDED and embedded_workload(images).digest != digest == first_workload(images).digest:
        return EMBEDDED_V1
    return name


def _pairs(indices: range) -> Workload:
    scenes = [pairs.render("test", index, seed=SCENE_SEED) for index in indices]
    return _workload(EMBEDDED, scenes, tuple(f"pairs/{index}" for index in indices))


def _cluttered(indices: range) -> Workload:
    scenes = [digits.render("test", index) for index in indices]
    return _workload(EMBEDDED_V1, scenes, tuple(f"test/{index}" for index in indices))


def _moving(indices: range) -> Workload:
    scenes = [moving_digits.render("test", index, seed=CLIP_SEED) for index in indices]
    return _drawn(
        MOVING,
        tuple(f"moving/{index}" for index in indices),
        pixels=[scene.frames for scene in scenes],
        labels=[scene.direction for scene in scenes],
        masks=[scene.masks for scene in scenes],
        clutter=[scene.clutter for scene in scenes],
        classes=DIRECTIONS,
        second=[scene.digit for scene in scenes],
    )


def _workload(name: str, scenes: Sequence[digits.Scene], ids: tuple[str, ...]) -> Workload:
    return _drawn(
        name,
        ids,
        pixels=[scene.image for scene in scenes],
        labels=[scene.label for scene in scenes],
        masks=[scene.mask for scene in scenes],
        clutter=[scene.clutter for scene in scenes],
        classes=CLASSES,
    )


def _drawn(
    name: str,
    ids: tuple[str, ...],
    *,
    pixels: Sequence[np.ndarray],
    labels: Sequence[int],
    masks: Sequence[np.ndarray],
    clutter: Sequence[int],
    classes: int,
    second: Sequence[int] | None = None,
) -> Workload:
    """Grey scenes or clips as a workload."""
    grey, numbers = np.stack(pixels)[..., None], np.array(labels, dtype=np.int64)
    return Workload(
        name=name,
        pixels=grey,
        labels=numbers,
        ids=ids,
        mean=(MEAN,),
        std=(STD,),
        classes=classes,
        digest=data_digest(grey, labels=numbers, ids=ids, mean=(MEAN,), std=(STD,)),
        masks=np.stack(masks),
        clutter=np.array(clutter, dtype=np.int64),
        second=None if second is None else np.array(second, dtype=np.int64),
    )
