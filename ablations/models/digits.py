"""The small models that read the embedded scenes, with weights that belong to the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ablations.models.clips import CLIP_CANVAS, CLIPS, DIRECTIONS, FRAMES
from ablations.models.siblings import SIBLINGS

EMBEDDED, EMBEDDED_V1 = "embedded", "embedded:v1"  # workloads: digit pairs, and the older cluttered digits
MOVING, VIDEOS = "moving_digits", "clips"  # the workloads of clips: drawn ones, and folders of real ones
CANVAS = 64  # pixels per side of a scene
CLASSES = 10
PATCH = 8
MEAN, STD = 0.13, 0.27  # of the pixels of scenes, as shares of white
MODELS: dict[str, dict[str, Any]] = {  # 12 blocks each, so that "blocks 3-11" means what it means for DeiT
    "digits_vit_small": {"embed_dim": 128, "num_heads": 4},
    "digits_vit_tiny": {"embed_dim": 64, "num_heads": 2},
}
PAIRS_MODEL = "pairs_vit_tiny"  # reads the digit pairs
PAIRS_MODELS: dict[str, dict[str, Any]] = {PAIRS_MODEL: MODELS["digits_vit_tiny"]}
# as HVT: no class token; the final norm, then the mean over the tokens. Trained from scratch, no weights are shipped.
_HVT = {"class_token": False, "global_pool": "avg", "fc_norm": False}
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "digits_hvt_small": {**MODELS["digits_vit_small"], **_HVT},
    "digits_hvt_tiny": {**MODELS["digits_vit_tiny"], **_HVT},
}
_VITS = {**MODELS, **PAIRS_MODELS, **FROM_SCRATCH}
KNOWN = (*_VITS, *SIBLINGS, *CLIPS)
SHIPPED: dict[str, tuple[str, ...]] = {  # by workload, the models whose weights read its scenes; the main one first
    EMBEDDED: tuple(PAIRS_MODELS),
    EMBEDDED_V1: tuple(MODELS),
    MOVING: tuple(CLIPS),
}
READS = {  # by model, the workload whose scenes its shipped weights read
    **{model: workload for workload, models in SHIPPED.items() for model in models},
    **dict.fromkeys(SIBLINGS, EMBEDDED),
    **dict.fromkeys(CLIPS, MOVING),
}
WEIGHTS = Path(__file__).parent / "weights"


def create_digits_model(name: str) -> VisionTransformer:
    """A plain timm ``VisionTransformer`` for 64 x 64 grey scenes in 8 x 8 patches, with random weights."""
    return VisionTransformer(
        img_size=CANVAS, patch_size=PATCH, in_chans=1, num_classes=CLASSES, depth=12, **_VITS[name]
    )


def create_known(name: str) -> nn.Module:
    """Any of ``KNOWN``, with random weights."""
    made = SIBLINGS.get(name) or CLIPS.get(name)
    return create_digits_model(name) if made is None else made()


def readers(workload: str) -> tuple[str, ...]:
    """The models that can read the scenes of an embedded workload, whatever their weights."""
    return tuple(name for name in KNOWN if (name in CLIPS) == (workload == MOVING))


def shows_clips(workload: str) -> bool:
    """Whether a workload has clips, and not images."""
    return workload in (MOVING, VIDEOS)


def what_is_shown(workload: str) -> str:
    """The scenes of an embedded workload, for messages."""
    if workload == MOVING:
        return f"clips of {FRAMES} frames of {CLIP_CANVAS} x {CLIP_CANVAS} grey pixels"
    return f"{CANVAS} x {CANVAS} grey digits"


def classes_of(name: str) -> int:
    """Of the head of one of ``KNOWN``."""
    return DIRECTIONS if name in CLIPS else CLASSES


def digits_input(name: str) -> dict[str, Any]:
    """What one of ``KNOWN`` reads, in the words of ``timm.data.resolve_model_data_config``; of a clip, each frame."""
    side = CLIP_CANVAS if name in CLIPS else CANVAS
    return {
        "input_size": (1, side, side),
        "mean": (MEAN,),
        "std": (STD,),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }


def normalise(images: Tensor) -> Tensor:
    """uint8 scenes (B, 64, 64) -> what the models read, (B, 1, 64, 64) float32."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def save_weights(model: torch.nn.Module, name: str, folder: Path) -> Path:
    """Write the weights as float16 safetensors, as they are shipped."""
    path = folder / f"{name}.safetensors"
    kept = {  # counters of batches stay whole numbers
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in model.state_dict().items()
    }
    save_file(kept, path)
    return path
