"""Which models the runtime may drive: those whose blocks it restates exactly, told by type and never by name.

Asked when a model is wrapped and again at each call, as its user may change it in between: about 50 microseconds for
twelve blocks.
"""

from __future__ import annotations

from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
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
_ROWWISE = tuple(kind.forward for kind in _ROWWISE_MLPS)
_POOLS = ("token", "avg", "max", "avgmax", "map")
_STEPS = ("forward", "forward_features", "forward_head", "pool")  # of the model, restated by the driver and the head
_BLOCK, _ATTENTION = Block.forward, Attention.forward  # what the runtime restates
_DROP_PATHS = (nn.Identity, DropPath)


def check_model(model: nn.Module) -> None:
    """Refuse a model that could not be run exactly, saying why and what is supported."""
    _check_type(model)
    assert isinstance(model, VisionTransformer)
    blocks = model._modules["blocks"]
    if type(blocks) is not nn.Sequential:
        raise UnsupportedModel(
            f"the model holds its blocks in a {type(blocks).__name__}, not a Sequential. {_SUPPORTED}."
        )
    _check_whole(model, "the model")
    _check_whole(blocks, "the model's blocks")
    replaced = [step for step in _STEPS if step in model.__dict__]
    if replaced:
        raise UnsupportedModel(
            f"the model's {replaced[0]} was replaced by another function, which would be bypassed; undo that. "
            f"{_SUPPORTED}."
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModel(
            "the model drops patches by itself (patch_drop_rate > 0); create it with patch_drop_rate=0"
        )
    if Block.forward is not _BLOCK or Attention.forward is not _ATTENTION:
        raise UnsupportedModel(
            "the forward of timm's Block or Attention was replaced for the whole process, and the reduced model would "
            f"bypass the new one; undo that. {_SUPPORTED}."
        )
    for index, block in enumerate(blocks._modules.values()):
        assert block is not None
        _check_block(index, block)
    _check_pool(model)


def _check_type(model: nn.Module) -> None:
    if type(model) in _MODELS:
        return
    name, parts = type(model).__name__, model._modules
    if "_orig_mod" in parts:
        raise UnsupportedModel(
            "the model is compiled already, and its blocks cannot be reached; reduce the plain model and compile the "
            "reduced one: torch.compile(reduce_tokens(model, placement)). The plain model of a compiled one is its "
            "_orig_mod"
        )
    if isinstance(parts.get("module"), nn.Module):
        raise UnsupportedModel(
            f"{name} wraps another model; reduce the model inside, and wrap the reduced one: "
            f"{name}(reduce_tokens(wrapped.module, placement))"
        )
    if isinstance(model, VisionTransformer) and name.startswith(("Parametrized", "FSDP")):
        raise UnsupportedModel(
            f"the model has become a {name}, whose own steps would be bypassed; remove the parametrization, or shard "
            f"the reduced model in place of the plain one. {_SUPPORTED}."
        )
    raise UnsupportedModel(f"{name} is not supported. {_SUPPORTED}.")


def _check_pool(model: VisionTransformer) -> None:
    if model.global_pool not in _POOLS:
        raise UnsupportedModel(
            f"global_pool={model.global_pool!r} is not supported; create the model with one of {', '.join(_POOLS)}"
        )
    if model.global_pool == "map":
        pool = model._modules["attn_pool"]
        if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None:
            raise UnsupportedModel(f"the attention pool {type(pool).__name__} is not supported. {_SUPPORTED}.")


def _check_whole(module: nn.Module, where: str) -> None:
    """Refuse what rides on a module that is restated and not called: hooks of any kind, a forward of its own."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    if (before or after) and any(_acts(hook) for hook in (*before.values(), *after.values())):
        kind = "forward hook"
    elif module._backward_hooks or module._backward_pre_hooks:
        kind = "backward hook"
    elif "forward" in module.__dict__:
        raise UnsupportedModel(
            f"the forward of {where} was replaced by another function, which would be bypassed; undo that. "
            f"{_SUPPORTED}."
        )
    else:
        return
    owner, _, part = where.partition("'s ")
    raise UnsupportedModel(
        f"{owner} has a {kind}{f' on its {part}' if part else ''}, which would be bypassed; remove the hook, or make "
        "the pruning or weight norm permanent, first. Hooks on the reduced model and on parts that are called (norm1, "
        f"mlp, patch_embed, head, …) are run. {_SUPPORTED}."
    )


def _acts(hook: object) -> bool:
    """fvcore hooks every module while it counts, to name where an operator stands, and nothing comes of it."""
    return type(hook).__module__ != "fvcore.nn.jit_analysis"


def _check_block(index: int, block: nn.Module) -> None:
    """Block, attention and qkv are restated, not called: whatever would change them must be seen here."""
    if type(block) is not Block:
        raise UnsupportedModel(
            f"block {index} is a {type(block).__name__}, which has another order of work, or steps of its own that "
            "would be bypassed (a compiled, sharded or checkpointing wrapper: compile or shard the reduced model, and "
            f"call the model's set_grad_checkpointing() instead). {_SUPPORTED}."
        )
    parts = block._modules
    attn, mlp = parts["attn"], parts["mlp"]
    if type(attn) is not Attention:
        raise UnsupportedModel(
            f"block {index} attends with {type(attn).__name__}, whose own steps would be bypassed (a sharded one: "
            f"shard the reduced model instead). {_SUPPORTED}."
        )
    qkv, dropout = attn._modules["qkv"], attn._modules["attn_drop"]
    if type(qkv) is not nn.Linear:
        raise UnsupportedModel(
            f"block {index} has its qkv replaced by a {type(qkv).__name__}, which would be bypassed; "
            "merge it into a plain Linear first (LoRA, quantisation, parametrisation), and shard the reduced model "
            f"instead of it. {_SUPPORTED}."
        )
    _check_whole(block, f"block {index}")
    _check_whole(attn, f"block {index}'s attn")
    _check_whole(qkv, f"block {index}'s attn.qkv")
    if type(dropout) is not nn.Dropout:
        raise UnsupportedModel(
            f"block {index} has its attn_drop replaced by a {type(dropout).__name__}, which would be bypassed; it must "
            f"be a plain Dropout. {_SUPPORTED}."
        )
    _check_whole(dropout, f"block {index}'s attn.attn_drop")
    for name in ("drop_path1", "drop_path2"):
        path = parts[name]
        if type(path) not in _DROP_PATHS:
            raise UnsupportedModel(
                f"block {index} has its {name} replaced by a {type(path).__name__}, which would be bypassed; it must "
                f"be timm's DropPath or an Identity. {_SUPPORTED}."
            )
        assert path is not None
        _check_whole(path, f"block {index}'s {name}")
    assert mlp is not None
    _check_mlp(index, mlp)


def _check_mlp(index: int, mlp: nn.Module) -> None:
    """It is called, on the tokens of all images in a row."""
    known = type(mlp) in _ROWWISE_MLPS or type(mlp).forward in _ROWWISE  # FSDP puts a class of its own before
    if not known or "forward" in mlp.__dict__ or any(isinstance(part, nn.Conv2d) for part in mlp._modules.values()):
        raise UnsupportedModel(
            f"block {index} has the MLP {type(mlp).__name__}"
            f"{', its forward replaced' if 'forward' in mlp.__dict__ else ''}, which is not known to act token by "
            f"token; replace the layers inside it instead. {_SUPPORTED}."
        )
