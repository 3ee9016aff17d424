"""From an encoded image of any kind to the uint8 pixels a model was trained to see.

The steps are timm's evaluation transform (resize by ``crop_pct``, centre crop), with one decision of our own:
an image that is already about the crop's size, its shorter side between the crop and crop / crop_pct, is only
centre-cropped. Data sets are often stored that way, and resizing a second time would blur them. ``resize="always"``
gives timm's transform to the letter, ``resize="never"`` only crops (and pads with black what is too small).
EXIF orientation is ignored, as timm and torchvision do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from ablations.workloads.base import WorkloadError
from ablations.workloads.problems import Unusable

Resize = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Preprocess:
    """How one image becomes an array (H, W, C) uint8. ``mean`` and ``std`` are applied later, batch by batch."""

    size: tuple[int, int]  # height and width of the crop, pixels
    channels: int  # 1 (grey) or 3 (RGB)
    crop_pct: float  # the crop's share of the resized image's side
    crop_mode: str  # timm's: center, squash or border
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "auto"

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise WorkloadError(f"unknown resize {self.resize!r}: choose one of {', '.join(get_args(Resize))}")
        if self.channels not in (1, 3):
            raise WorkloadError(f"the model reads {self.channels} channels; images give 1 (grey) or 3 (RGB)")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, resize: Resize = "auto") -> Preprocess:
        """From what ``timm.data.resolve_model_data_config`` returns."""
        channels, height, width = config["input_size"]
        return cls(
            size=(height, width),
            channels=channels,
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize=resize,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one preprocessed image."""
        return (*self.size, self.channels)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the pixels, for cache keys (normalisation comes after the pixels)."""
        return {key: value for key, value in asdict(self).items() if key not in ("mean", "std")}

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Convert, resize and crop one image: (H, W, C) uint8."""
        image = convert(image, channels=self.channels)
        if self._only_crops(image):
            pixels = np.asarray(center_crop(image, list(self.size)))
            return pixels.reshape(self.shape)  # a grey image comes without a channel axis
        self._refuse_elongated(image)
        return self._timm(image).permute(1, 2, 0).numpy()

    def crops(self, image: Image.Image, count: int) -> np.ndarray:
        """(count, H, W, C) uint8: crops evenly along the longer side of the image, from its one end to the other; one
        is the centre's, as by calling this. For square crops of ``crop_mode`` center.
        """
        if count == 1:
            return self(image)[None]
        side = self.size[0]
        image = convert(image, channels=self.channels)
        if not self._only_crops(image):
            self._refuse_elongated(image)
            how = InterpolationMode(self.interpolation)
            image = resize(image, [math.floor(side / self.crop_pct)], interpolation=how)
        spare = (image.width - side, image.height - side)
        if min(spare) < 0:  # `resize="never"` leaves what is too small
            image = center_crop(image, [max(side, image.height), max(side, image.width)])
            spare = (image.width - side, image.height - side)
        along = 0 if image.width >= image.height else 1
        found = []
        for number in range(count):
            at = [round(each / 2) for each in spare]  # as torchvision puts the centre
            at[along] = at[along] if 2 * number == count - 1 else spare[along] * number // (count - 1)
            left, top = at
            found.append(np.asarray(image.crop((left, top, left + side, top + side))).reshape(self.shape))
        return np.stack(found)

    def _only_crops(self, image: Image.Image) -> bool:
        if self.resize != "auto":
            return self.resize == "never"
        sides = [(image.height, self.size[0]), (image.width, self.size[1])]
        fits = [crop <= side for side, crop in sides]
        small = [side <= math.floor(crop / self.crop_pct) for side, crop in sides]
        # squash and border keep the whole picture, so there both sides must already be about right
        return all(fits) and (any(small) if self.crop_mode == "center" else all(small))

    def _refuse_elongated(self, image: Image.Image) -> None:
        """A picture of 1 x 10000 pixels would be enlarged to a bomb."""
        ratio = max(image.size) / min(image.size)
        pixels = ratio * (max(self.size) / self.crop_pct) ** 2
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Unusable(f"too elongated: {image.width} x {image.height} pixels")

    @functools.cached_property
    def _timm(self) -> Any:
        return create_transform(
            input_size=(self.channels, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            std=self.std,
            normalize=False,  # uint8 (C, H, W) out
        )


def convert(image: Image.Image, *, channels: int) -> Image.Image:
    """Any Pillow mode to RGB (or grey): palettes looked up, 16 bits scaled to 8, transparency laid on white."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255 and leave a white picture
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise Unusable(f"pixels without an agreed range: mode {image.mode}; store them with 8 or 16 bits")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")
