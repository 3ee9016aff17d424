"""Small models of timm's families beside the plain ViT, and their entry points cut to two blocks; far from neutral."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from .conftest import DEPTH

FAMILIES = ("eva", "beit", "vision_transformer_relpos", "naflexvit")
_SIZES = {"patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
_GROUPED = {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": (2, 1, 1, 2), "qk_norm": True}
_HALF = {"rope_type": "dinov3", "rope_rotate_half": True}

_EVA: dict[str, dict[str, Any]] = {
    "eva": {"global_pool": "avg", "init_values": 0.4},
    "eva post-norm": {"use_post_norm": True, "global_pool": "token"},
    "eva02": {"use_rot_pos_emb": True, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True,
              "scale_attn_inner": True, "ref_feat_shape": (4, 4), "global_pool": "token"},
    "dinov3": {"use_rot_pos_emb": True, **_HALF, "num_reg_tokens": 4, "no_embed_class": True, "use_abs_pos_emb": False,
               "dynamic_img_size": True, "init_values": 0.5, "num_classes": 0, "use_fc_norm": False,
               "global_pool": "avg", "rope_rescale_coords": 2.0},
    "rope mixed": {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope", "rope_grid_indexing": "xy",
                   "global_pool": "token", "init_values": 0.3},
    "pe": {"use_rot_pos_emb": True, "attn_type": "rope", "use_pre_transformer_norm": True, "global_pool": "map",
           "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"},
    "pe without class token": {"use_rot_pos_emb": True, "attn_type": "rope", "class_token": False,
                               "global_pool": "map"},
    "sapiens2": {"use_rot_pos_emb": True, **_HALF, **_GROUPED, "attn_only_layer_scale": True, "init_values": 0.4,
                 "num_reg_tokens": 8, "global_pool": "token"},
}  # fmt: skip
_BEIT: dict[str, dict[str, Any]] = {
    "beit": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.4},
    "beit shared": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "global_pool": "token"},
    "beit without bias": {},
}
_RELPOS: dict[str, dict[str, Any]] = {
    "relpos": {},
    "relpos swin": {"rel_pos_type": "mlp-swin", "qk_norm": True, "init_values": 0.3},
    "relpos table": {"rel_pos_type": "bias", "class_token": True, "global_pool": "token"},
    "relpos class token": {"class_token": True, "fc_norm": True},
    "relpos shared": {"shared_rel_pos": True},
    "relpos res-post": {"block_fn": ResPostRelPosBlock, "init_values": 0.7},
}
_NAFLEX: dict[str, dict[str, Any]] = {
    "naflex": {"global_pool": "token", "class_token": True, "reg_tokens": 3, "init_values": 0.4},
    "naflex map": {"global_pool": "map", "reg_tokens": 1, "pool_include_prefix": True},
    "naflex factorized": {"global_pool": "avg", "pos_embed": "factorized", "pos_embed_grid_size": (4, 4)},
    "naflex rope": {"global_pool": "avg", "rope_type": "axial", "pos_embed": "none", "reg_tokens": 2},
    "naflex mixed": {"global_pool": "avg", "rope_type": "mixed", "pos_embed": "none"},
}
MODELS = (*_EVA, *_BEIT, *_RELPOS, *_NAFLEX)
PLACED = [
    name for name in MODELS
    if name not in ("eva", "eva post-norm", "beit without bias", "naflex", "naflex map", "naflex factorized")
]  # fmt: skip
ROPES = ("eva02", "dinov3", "rope mixed", "pe", "sapiens2", "naflex rope", "naflex mixed")


def made(name: str, **changes: Any) -> Any:
    """A model for images of 48 x 48 whose every parameter matters, in float64."""
    torch.manual_seed(0)
    options, sizes = {"img_size": 48, "num_classes": 7, **changes}, {**_SIZES, "depth": changes.pop("depth", DEPTH)}
    options.pop("depth", None)
    if name in _NAFLEX:
        model: Any = NaFlexVit(NaFlexVitCfg(**{**sizes, "pos_embed_grid_size": (6, 6), **_NAFLEX[name]}), **options)
    else:
        kind = Eva if name in _EVA else Beit if name in _BEIT else VisionTransformerRelPos
        model = kind(**{**options, **sizes, **{**_EVA, **_BEIT, **_RELPOS}[name], **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def fill(model: nn.Module, noise: Tensor) -> None:
    """Random parameters away from any neutral value, cut from ready-made noise: drawing those of the giants would take
    minutes.
    """
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            size = parameter.numel()
            flat = noise.repeat(-(-size // len(noise))) if size > len(noise) else noise
            flat = flat.roll(7919 * index)[:size] if size < 2**16 else flat[:size]
            spread = 0.3 if parameter.dim() <= 1 else parameter[0].numel() ** -0.5
            parameter.copy_(flat.view_as(parameter) * spread)
            if parameter.dim() <= 1:  # norms and LayerScale: around 1, so that a dropped one cannot hide
                parameter.add_(1.0)


def shallow(name: str, **changes: Any) -> Any:
    """An entry point with two blocks, on the meta device; Sapiens2 with fewer keys than queries in the second, which it
    has in the middle of its depth.
    """
    with torch.device("meta"):
        if name.endswith("sapiens2"):
            heads = timm.create_model(name, depth=1, num_kv_heads=(None,)).blocks[0].attn.num_heads
            changes["num_kv_heads"] = (None, heads // 2)
        return timm.create_model(name, depth=2, **changes)


def filled(name: str, noise: Tensor) -> tuple[Any, Tensor]:
    """An entry point with two blocks on a 4 x 4 grid, far from neutral, and two images."""
    probe = shallow(name)
    side = 4 * (probe.embeds if hasattr(probe, "embeds") else probe.patch_embed).patch_size[0]
    model = shallow(name, img_size=side).to_empty(device="cpu")
    for part in model.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
    fill(model, noise)
    return model.eval(), torch.randn(2, 3, side, side)
