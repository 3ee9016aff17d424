"""Small models of every kind the runtime drives, with nothing so small that an error could hide in it."""

from __future__ import annotations

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

DEPTH = 4
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 7}


def make_vit(kind: str = "class", *, seed: int = 0, **changes: object) -> VisionTransformer:
    """A random model whose every parameter matters: biases, norms and LayerScale are far from their neutral values."""
    torch.manual_seed(seed)
    options = {**SIZES, **KINDS[kind], **changes}
    model_class = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    model = model_class(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


KINDS: dict[str, dict[str, object]] = {
    "class": {},
    "distilled": {},
    "registers": {"reg_tokens": 4, "init_values": 0.5},
    "average": {"class_token": False, "global_pool": "avg"},
    "average_with_class": {"global_pool": "avg"},
    "avgmax": {"class_token": False, "global_pool": "avgmax"},
    "map": {"class_token": False, "global_pool": "map"},
    "qk_norm": {"qk_norm": True, "init_values": 0.3, "scale_attn_norm": True},
    "no_qkv_bias": {"qkv_bias": False, "pre_norm": True},
}
WITHOUT_CLASS_TOKEN = {"average", "avgmax", "map"}


@pytest.fixture
def images() -> Tensor:
    """Five images, one of them constant."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(5, 3, 48, 48, generator=generator)
    batch[4] = 0.25
    return batch
