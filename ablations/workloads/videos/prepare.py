"""From the frames of a video to the pixels of a clip: views, each cropped as the model reads images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ablations.workloads.base import WorkloadError
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.videos.sampling import Sampling, places, too_short


@dataclass(frozen=True)
class ClipPreprocess:
    """How a clip becomes an array (views · F, H, W, C) uint8: views in time one after the other, of each its crops,
    of each its frames.
    """

    frame: Preprocess
    frames: int  # F, of a view
    sampling: Sampling
    decoder: str = ""  # its version, where files are videos

    def __post_init__(self) -> None:
        if self.sampling.spatial > 1:
            if self.frame.crop_mode != "center":
                raise WorkloadError(
                    f"the model's processor stretches a frame to its size, so there are no {self.sampling.spatial} "
                    "crops of it: leave them out of VIEWS (--views)"
                )
            if self.frame.size[0] != self.frame.size[1]:
                raise WorkloadError("views in space are crops along the longer side, for a model of square frames")

    @property
    def mean(self) -> tuple[float, ...]:
        return self.frame.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.frame.std

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one prepared clip."""
        return (self.sampling.views * self.frames, *self.frame.shape)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the pixels, for cache keys."""
        of_views = {"stride": self.sampling.stride, "temporal": self.sampling.temporal}
        return {
            **self.frame.describe(), "frames": self.frames, **of_views, "spatial": self.sampling.spatial,
            "decoder": self.decoder,
        }  # fmt: skip

    def places(self, length: int) -> np.ndarray:
        """(temporal, F) int64: the frames that are wanted of a video of so many."""
        return places(length, frames=self.frames, stride=self.sampling.stride, temporal=self.sampling.temporal)

    def too_short(self, length: int) -> bool:
        """Whether a frame is shown twice."""
        return too_short(length, frames=self.frames, stride=self.sampling.stride)

    def crops(self, image: Image.Image) -> np.ndarray:
        """(spatial, H, W, C) uint8 of one frame: full-size frames are never kept."""
        return self.frame.crops(image, self.sampling.spatial)

    def clip(self, wanted: np.ndarray, crops: Mapping[int, np.ndarray]) -> np.ndarray:
        """The clip (views · F, H, W, C) of frames ``wanted`` (temporal, F), by their ``crops`` (spatial, H, W, C)."""
        views = np.stack([np.stack([crops[place] for place in view], axis=1) for view in wanted.tolist()])
        return views.reshape(self.shape)  # (temporal, spatial, F, …)

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """A clip comes prepared, frame by frame as it was decoded."""
        assert clip.shape == self.shape and clip.dtype == np.uint8
        return clip
