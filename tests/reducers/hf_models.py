"""Small models of transformers, with every parameter away from neutral."""

from __future__ import annotations

from typing import Any

import torch

DEPTH = 4
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 48,
    "patch_size": 8,
}  # fmt: skip
_LABELS = {"num_labels": 7}

CLASSES = [
    "ViTModel", "ViTModel without pooler", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher", "Dinov2Model", "Dinov2ForImageClassification", "Dinov2Model gated",
    "Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification", "DINOv3ViTModel", "DINOv3ViTModel gated",
    "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification", "SiglipVisionModel",
    "SiglipVisionModel without head", "SiglipForImageClassification",
]  # fmt: skip


def make_hf(name: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a class, in evaluation mode."""
    import transformers as tf

    cls, _, variant = name.partition(" ")
    sizes: dict[str, Any] = {**_SIZES, **changes}
    whole = cls.endswith("ForImageClassification") and cls.startswith(("CLIP", "Siglip"))
    labels = _LABELS if "Classification" in cls else {}
    more: dict[str, Any] = {}
    if cls.startswith("Dinov2"):
        sizes.pop("intermediate_size")
        more = {"mlp_ratio": 2, "use_swiglu_ffn": variant == "gated"}
        config = (tf.Dinov2WithRegistersConfig if "Registers" in cls else tf.Dinov2Config)(**sizes, **labels, **more)
    elif cls.startswith("DINOv3"):
        config = tf.DINOv3ViTConfig(**sizes, num_register_tokens=3, use_gated_mlp=variant == "gated", key_bias=True)
    elif cls.startswith("CLIP"):
        config = tf.CLIPVisionConfig(**sizes, projection_dim=5)
        config = tf.CLIPConfig(vision_config=config.to_dict(), **labels) if whole else config
    elif cls.startswith("Siglip"):
        config = tf.SiglipVisionConfig(**sizes, vision_use_head=variant != "without head")
        config = tf.SiglipConfig(vision_config=config.to_dict(), **labels) if whole else config
    else:
        config = (tf.ViTConfig if cls.startswith("ViT") else tf.DeiTConfig)(**sizes, **labels)
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if variant == "without pooler" else {}
    model = getattr(tf, cls)(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()
