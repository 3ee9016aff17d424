"""Which frames of a video a model sees, and which parts of each: views, as evaluations on Kinetics take them.

A view is as many frames as the model reads, ``stride`` frames of the video apart, cropped at one place. Of
``temporal`` views the first begins with the video, the last ends with it, and the others begin evenly between (one
alone lies in the middle); each is taken at ``spatial`` places along the longer side of a frame, in the same way (one
alone in the centre). Without a stride, frames are spread over the whole video: the middles of as many equal parts. A
video that is too short for a view repeats its last frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ablations.workloads.base import WorkloadError

_VIEWS = re.compile(r"(?:(\d{1,3})\s*[x×]\s*)?(\d{1,3})")
MOST_TEMPORAL, MOST_SPATIAL = 100, 3


@dataclass(frozen=True)
class Sampling:
    """What a person asks of clips."""

    stride: int | None = None  # None: spread evenly over the whole video
    temporal: int = 1
    spatial: int = 1

    def __post_init__(self) -> None:
        for name, value, most in (
            ("STRIDE", self.stride, 10**6),
            ("VIEWS (in time)", self.temporal, MOST_TEMPORAL),
            ("VIEWS (in space)", self.spatial, MOST_SPATIAL),
        ):
            if value is not None and not 1 <= value <= most:
                raise WorkloadError(f"{name} of {value}: give a whole number from 1 to {most}")
        if self.spatial == 2:
            raise WorkloadError("two crops of a frame leave out its middle: ask for 1 or 3 (VIEWS=3)")
        if self.temporal > 1 and self.stride is None:
            raise WorkloadError(
                f"{self.temporal} views in time need a stride, for without one a view is spread over the whole video: "
                "say STRIDE=N (--stride)"
            )

    @property
    def views(self) -> int:
        """Of a clip, in time and in space."""
        return self.temporal * self.spatial


ONE_VIEW = Sampling()


def parse_sampling(stride: int | None, views: str | None) -> Sampling:
    """From the words of a command: ``views`` is ``3`` (crops) or ``4x3`` (in time x crops), as tables print them.

    Raises:
        WorkloadError: they say nothing that can be done.
    """
    found = _VIEWS.fullmatch((views or "1").strip().lower())
    if found is None:
        raise WorkloadError(f"VIEWS={views!r} is no number of views: write 3 (crops), or 4x3 (views in time x crops)")
    return Sampling(stride, int(found[1] or 1), int(found[2]))


def places(length: int, *, frames: int, stride: int | None, temporal: int) -> np.ndarray:
    """(temporal, frames) int64: the frames that each view in time takes of a video of ``length`` frames."""
    assert length > 0
    if stride is None:
        middles = (2 * np.arange(frames, dtype=np.int64) + 1) * length // (2 * frames)
        return np.tile(middles, (temporal, 1))
    spare = max(0, length - ((frames - 1) * stride + 1))
    number = np.arange(temporal, dtype=np.int64)
    starts = np.array([spare // 2]) if temporal == 1 else spare * number // (temporal - 1)
    steps = np.arange(frames, dtype=np.int64) * stride
    return np.minimum(starts[:, None] + steps, length - 1)


def too_short(length: int, *, frames: int, stride: int | None) -> bool:
    """Whether a view must show a frame twice."""
    return length < ((frames - 1) * (stride or 1) + 1)
