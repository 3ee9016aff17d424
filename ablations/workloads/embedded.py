"""The embedded workload: cluttered digits, with nothing to download."""

from __future__ import annotations

import functools

import numpy as np

from ablations.models.digits import CLASSES, MEAN, STD
from ablations.workloads import digits
from ablations.workloads.base import CALIBRATION, Workload, data_digest


@functools.lru_cache(maxsize=2)  # drawing them takes a second; nobody changes them
def embedded_workload(limit: int = 2160) -> Workload:
    """The first ``limit`` held-out scenes, with the mask of each digit and its clutter level.

    A multiple of 360 shows every held-out digit equally often. There are only 360 of them: intervals over images
    do not know that a digit comes back in another place, so treat small differences with care.
    """
    return _scenes(range(limit))


@functools.lru_cache(maxsize=2)
def calibration_scenes(limit: int, count: int = CALIBRATION) -> Workload:
    """``count`` scenes beyond the first ``limit``: to calibrate on without evaluating fewer."""
    return _scenes(range(limit, limit + count))


def _scenes(indices: range) -> Workload:
    scenes = [digits.render("test", index) for index in indices]
    pixels = np.stack([scene.image for scene in scenes])[..., None]
    labels = np.array([scene.label for scene in scenes], dtype=np.int64)
    ids = tuple(f"test/{index}" for index in indices)
    return Workload(
        name="embedded",
        pixels=pixels,
        labels=labels,
        ids=ids,
        mean=(MEAN,),
        std=(STD,),
        classes=CLASSES,
        digest=data_digest(pixels, labels=labels, ids=ids, mean=(MEAN,), std=(STD,)),
        masks=np.stack([scene.mask for scene in scenes]),
        clutter=np.array([scene.clutter for scene in scenes], dtype=np.int64),
    )
