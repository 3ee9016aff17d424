"""The backbones of the ATS paper that no library has as their authors wrote them, by name: CvT, PS-ViT and X-ViT.

They come without weights: ``WEIGHTS=file.safetensors``, or ``random``. ``reducers.backbones`` has the modules; one is
imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor, nn

from ablations.models.weight_files import ModelError

CLASSES, KINETICS = 1000, 400
_SIZE = 224
_BY_AUTHORS = "ps_layers."  # begins names in the authors' own files of PS-ViT


@dataclass(frozen=True)
class Family:
    """A module of ``reducers.backbones``, and how its authors cut images."""

    module: str
    crop: float
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    classes: int = CLASSES


_CVT, _PS_VIT = Family("reducers.backbones.cvt", 0.875), Family("reducers.backbones.ps_vit", 0.9)
_XVIT = Family(  # frames as a ViT of ImageNet-21k reads images
    "reducers.backbones.xvit", 1.0, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, KINETICS
)
FRAMES = {"xvit_b_8": 8, "xvit_b_16": 16}  # of a clip
CLASSIFIER = dict.fromkeys(FRAMES, "head.fc")  # of the others "head"
PAPER: dict[str, Family] = {
    **dict.fromkeys(("cvt_13", "cvt_21"), _CVT),
    **dict.fromkeys(("ps_vit_ti_14", "ps_vit_b_10", "ps_vit_b_14", "ps_vit_b_16", "ps_vit_b_18"), _PS_VIT),
    **dict.fromkeys(FRAMES, _XVIT),
}


def create(name: str, *, size: tuple[int, int] | None, classes: int | None = None) -> nn.Module:
    """The architecture with random weights; ``classes`` 0: without a classifier.

    Raises:
        ModelError: images of such a size are not for it.
    """
    side: int | tuple[int, int] = _SIZE
    if size is not None:
        side = size[0] if size[0] == size[1] else size
    make: Any = getattr(import_module(PAPER[name].module), name)
    try:
        model: nn.Module = make(img_size=side, num_classes=PAPER[name].classes if classes is None else classes)
    except ValueError as error:
        raise ModelError(f"{name} does not take images of that size: {error}") from error
    return model


def input_of(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """What a model reads, in the words of ``timm.data.resolve_model_data_config``."""
    height, width = size or (_SIZE, _SIZE)
    return {
        "input_size": (3, height, width),
        "mean": PAPER[name].mean,
        "std": PAPER[name].std,
        "crop_pct": PAPER[name].crop,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }


def classes_of(name: str) -> int:
    """Of the head that the authors trained."""
    return PAPER[name].classes


def adopted(model: Any, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights under this project's names; those of PS-ViT's authors are converted."""
    if not any(key.startswith(_BY_AUTHORS) for key in weights):
        return weights
    from reducers.backbones.ps_vit import from_authors

    return from_authors(weights, num_heads=model.heads)
