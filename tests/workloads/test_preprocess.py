"""Decoding every kind of picture to the pixels a model expects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from ablations.workloads.base import Workload, WorkloadError
from ablations.workloads.decode import load_image
from ablations.workloads.preprocess import Preprocess, convert
from tests.workloads.conftest import noise


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(80, 50), (33, 90), (20, 20), (1, 1)])
def test_always_resizing_gives_timms_evaluation_transform(preprocess: Preprocess, size, crop_mode) -> None:
    steps = dataclasses.replace(preprocess, resize="always", crop_mode=crop_mode)
    image = noise(size, seed=1)
    pixels = steps(image)
    ours = Workload("test", pixels[None], np.array([0]), ("a",), steps.mean, steps.std, 1, "-").batch(0, 1)[0]
    timm = create_transform(
        (3, 32, 32),
        interpolation="bicubic",
        crop_pct=0.9,
        crop_mode=crop_mode,
        mean=steps.mean,
        std=steps.std,
    )
    torch.testing.assert_close(ours, timm(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (35, 35), (33, 60), (60, 33)])
def test_an_image_of_about_the_crops_size_is_only_cropped(preprocess: Preprocess, size: tuple[int, int]) -> None:
    image = noise(size, seed=2)
    left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    expected = np.asarray(image)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(preprocess(image), expected)


@pytest.mark.parametrize("size", [(31, 40), (36, 40), (36, 36)])
def test_an_image_of_another_size_is_resized(preprocess: Preprocess, size: tuple[int, int]) -> None:
    image = noise(size, seed=3)
    always = dataclasses.replace(preprocess, resize="always")
    np.testing.assert_array_equal(preprocess(image), always(image))


def test_squashing_models_crop_only_when_both_sides_are_right(preprocess: Preprocess) -> None:
    squash = dataclasses.replace(preprocess, crop_mode="squash")
    wide = noise((60, 33), seed=4)
    np.testing.assert_array_equal(squash(wide), dataclasses.replace(squash, resize="always")(wide))
    almost = noise((34, 33), seed=4)
    np.testing.assert_array_equal(squash(almost), preprocess(almost))


def test_never_resizing_pads_what_is_too_small_with_black(preprocess: Preprocess) -> None:
    never = dataclasses.replace(preprocess, resize="never")
    pixels = never(Image.new("RGB", (10, 40), "white"))
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:, 11:21] == 255).all() and not pixels[:, :11].any() and not pixels[:, 21:].any()


def test_a_grey_model_gets_one_channel(preprocess: Preprocess) -> None:
    grey = dataclasses.replace(preprocess, channels=1)
    for size in [(33, 33), (80, 60)]:
        assert grey(noise(size, seed=5)).shape == (32, 32, 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_pillow_mode_becomes_rgb(preprocess: Preprocess, mode: str) -> None:
    start = noise((34, 34), seed=6)
    image = Image.new("LAB", (34, 34)) if mode == "LAB" else start.convert(mode)
    assert preprocess(image).shape == (32, 32, 3)


def test_a_palette_is_looked_up_and_not_read_as_grey() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 250, 10, 20])
    assert convert(image, channels=3).getpixel((0, 0)) == (250, 10, 20)


def test_transparent_pixels_show_white_and_not_their_hidden_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert convert(load_image(tmp_path / "clear.png"), channels=3).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9, 250, 10, 20])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert convert(load_image(tmp_path / "palette.png"), channels=3).getpixel((0, 0)) == (255, 255, 255)


def test_a_cmyk_jpeg_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = convert(load_image(tmp_path / "red.jpg"), channels=3).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 256 + 7, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert convert(load_image(tmp_path / "deep.png"), channels=3).getpixel((0, 0)) == (128, 128, 128)


def test_pixels_without_an_agreed_range_are_refused() -> None:
    with pytest.raises(ValueError, match="without an agreed range"):
        convert(Image.new("F", (4, 4)), channels=3)


def test_an_image_that_resizing_would_blow_up_is_refused(preprocess: Preprocess) -> None:
    with pytest.raises(ValueError, match="too elongated"):
        preprocess(Image.new("RGB", (200_000, 1)))


def test_an_unknown_resize_names_the_known_ones(preprocess: Preprocess) -> None:
    with pytest.raises(WorkloadError, match="auto, always, never"):
        dataclasses.replace(preprocess, resize="sometimes")


def test_a_model_of_five_channels_is_refused(preprocess: Preprocess) -> None:
    with pytest.raises(WorkloadError, match="5 channels"):
        dataclasses.replace(preprocess, channels=5)
