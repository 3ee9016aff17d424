"""Which models the runtime may drive: those whose blocks it restates exactly, told by type and never by name."""

from __future__ import annotations

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from reducers.errors import UnsupportedModel

_SUPPORTED = (
    "Supported: timm's VisionTransformer and VisionTransformerDistilled (ViT, DeiT, DeiT-III, AugReg, CLIP, SigLIP, "
    "DINOv2, …) whose blocks are plain Block with Attention"
)
_MODELS = (VisionTransformer, VisionTransformerDistilled)
_ROWWISE_MLPS = (Mlp, GluMlp, SwiGLU)  # each token by itself; one that mixes tokens would be run wrongly
_POOLS = ("token", "avg", "max", "avgmax", "map")


def check_model(model: nn.Module) -> None:
    """Refuse a model that could not be run exactly, saying why and what is supported."""
    if type(model) not in _MODELS or not isinstance(model, VisionTransformer):
        raise UnsupportedModel(f"{type(model).__name__} is not supported. {_SUPPORTED}.")
    if not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModel(
            "the model drops patches by itself (patch_drop_rate > 0); create it with patch_drop_rate=0"
        )
    for index, block in enumerate(model.blocks):
        _check_block(index, block)
    if model.global_pool not in _POOLS:
        raise UnsupportedModel(
            f"global_pool={model.global_pool!r} is not supported; create the model with one of {', '.join(_POOLS)}"
        )
    if model.global_pool == "map":
        pool = model.attn_pool
        if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None:
            raise UnsupportedModel(f"the attention pool {type(pool).__name__} is not supported. {_SUPPORTED}.")


def _check_block(index: int, block: nn.Module) -> None:
    """Block, attention and qkv are restated, not called: whatever would change them must be seen here."""
    if type(block) is not Block:
        raise UnsupportedModel(
            f"block {index} is a {type(block).__name__}, which has another order of work. {_SUPPORTED}."
        )
    if type(block.attn) is not Attention:
        raise UnsupportedModel(f"block {index} attends with {type(block.attn).__name__}. {_SUPPORTED}.")
    if type(block.attn.qkv) is not nn.Linear:
        raise UnsupportedModel(
            f"block {index} has its qkv replaced by a {type(block.attn.qkv).__name__}, which would be bypassed; "
            f"merge it into a plain Linear first (LoRA, quantisation, parametrisation). {_SUPPORTED}."
        )
    for name, module in (("block", block), ("attn", block.attn), ("attn.qkv", block.attn.qkv)):
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModel(
                f"block {index} has a forward hook on its {name}, which would be bypassed; remove the hook, or make "
                f"the pruning permanent, first. {_SUPPORTED}."
            )
    mlp = block.mlp
    if type(mlp) not in _ROWWISE_MLPS or any(isinstance(layer, nn.Conv2d) for layer in mlp.modules()):
        raise UnsupportedModel(
            f"block {index} has the MLP {type(mlp).__name__}, which is not known to act token by token."
        )
