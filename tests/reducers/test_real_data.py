"""Counts the authors' release of ATS gives on real data, where the data is at hand (SIEVIT_DATA names its folder)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from reducers import ATS, Ratio, at, reduce_tokens

DATA = Path(os.environ.get("SIEVIT_DATA", "no-such-folder"))
RELEASED = [163.9, 147.1, 135.5, 120.0, 103.5, 96.0, 76.0, 68.1, 63.6]  # tokens leaving blocks 3-11

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="SIEVIT_DATA names no folder with the real data")


@torch.inference_mode()
def test_the_official_variant_keeps_the_tokens_that_the_release_keeps() -> None:
    """Sixteen validation images, every 58th of 928. The release adds 1e-6 to its softmax, which moves up to three of
    some 1600 tokens over a sampling point; with that epsilon put in by hand all nine numbers are equal.
    """
    files = sorted((DATA / "imagenet-val-928").glob("*/*.JPEG"))[::58]
    pixels = [np.asarray(Image.open(file).convert("RGB").crop((2, 2, 226, 226))) for file in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(DATA / "deit_tiny_patch16_224.safetensors"))
    _, trace = reduce_tokens(model, at(range(3, 12), ATS(Ratio(1.0), variant="official"))).trace((images - mean) / std)
    leaving = trace.tokens[:, 4:].double().mean(0)
    torch.testing.assert_close(leaving, torch.tensor(RELEASED, dtype=torch.float64), rtol=0, atol=0.25)
