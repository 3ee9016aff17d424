"""The embedded workload: cluttered digits and the small ViTs trained on them, with nothing to download."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ablations.workloads import digits
from ablations.workloads.base import CALIBRATION, Workload, data_digest

PATCH = 8
MODELS: dict[str, dict[str, Any]] = {  # 12 blocks each, so that "blocks 3-11" means what it means for DeiT
    "digits_vit_small": {"embed_dim": 128, "num_heads": 4},
    "digits_vit_tiny": {"embed_dim": 64, "num_heads": 2},
}
# as HVT: no class token; the final norm, then the mean over the tokens. Trained from scratch, no weights are shipped.
_HVT = {"class_token": False, "global_pool": "avg", "fc_norm": False}
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "digits_hvt_small": {**MODELS["digits_vit_small"], **_HVT},
    "digits_hvt_tiny": {**MODELS["digits_vit_tiny"], **_HVT},
}
KNOWN = {**MODELS, **FROM_SCRATCH}
WEIGHTS = Path(__file__).parents[1] / "models" / "weights"
_MEAN, _STD = 0.13, 0.27


def create_digits_model(name: str) -> VisionTransformer:
    """A plain timm ``VisionTransformer`` for 64 x 64 grey scenes in 8 x 8 patches, with random weights."""
    return VisionTransformer(
        img_size=digits.CANVAS, patch_size=PATCH, in_chans=1, num_classes=digits.CLASSES, depth=12, **KNOWN[name]
    )


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
        mean=(_MEAN,),
        std=(_STD,),
        classes=digits.CLASSES,
        digest=data_digest(pixels, labels=labels, ids=ids, mean=(_MEAN,), std=(_STD,)),
        masks=np.stack([scene.mask for scene in scenes]),
        clutter=np.array([scene.clutter for scene in scenes], dtype=np.int64),
    )


def normalise(images: Tensor) -> Tensor:
    """uint8 scenes (B, 64, 64) -> what the models read, (B, 1, 64, 64) float32."""
    return ((images.float() / 255 - _MEAN) / _STD).unsqueeze(1)


def save_weights(model: torch.nn.Module, name: str, folder: Path) -> Path:
    """Write the weights as float16 safetensors, as they are shipped."""
    path = folder / f"{name}.safetensors"
    save_file({key: value.detach().half().contiguous().cpu() for key, value in model.state_dict().items()}, path)
    return path
