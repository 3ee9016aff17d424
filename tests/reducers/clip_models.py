"""Small video models of transformers, with every parameter away from neutral."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEPTH, FRAMES, SIDE = 4, 5, 24  # SIDE: pixels; 3 x 3 patches of 8
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": SIDE, "patch_size": 8, "num_frames": FRAMES,
}  # fmt: skip
TIMESFORMERS = [
    "TimesformerModel", "TimesformerForVideoClassification", "TimesformerForVideoClassification joint_space_time",
    "TimesformerForVideoClassification space_only", "TimesformerModel joint_space_time", "TimesformerModel space_only",
]  # fmt: skip
WHOLE_CLIPS = [
    "VivitModel", "VivitModel without pooler", "VivitForVideoClassification", "VideoMAEModel", "VideoMAEModel normed",
    "VideoMAEForVideoClassification",
]  # fmt: skip


def make_clips(name: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a class, in evaluation mode."""
    import transformers as tf

    cls, _, variant = name.partition(" ")
    pooled = changes.pop("use_mean_pooling", variant != "normed")
    sizes: dict[str, Any] = {**_SIZES, **changes}
    labels = {"num_labels": 7} if "Classification" in cls else {}
    if cls.startswith("Timesformer"):
        config = tf.TimesformerConfig(**sizes, **labels, attention_type=variant or "divided_space_time")
    else:
        sizes["num_frames"] = changes.get("num_frames", 6)
        if cls.startswith("Vivit"):
            sizes["tubelet_size"] = [2, sizes.pop("patch_size"), 8]
            config = tf.VivitConfig(**sizes, **labels)
        else:
            config = tf.VideoMAEConfig(**sizes, **labels, tubelet_size=2, use_mean_pooling=pooled)
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if variant == "without pooler" else {}
    model = getattr(tf, cls)(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def make_inputs(model: Any, clips: int = 3) -> Tensor:
    """Random clips of a model's size, float64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(clips, model.config.num_frames, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
