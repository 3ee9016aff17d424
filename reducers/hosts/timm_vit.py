"""timm's VisionTransformer: ViT, DeiT, CLIP, SigLIP, DINOv2, … where it is built of plain ``Block`` with ``Attention``.

Restated exactly, and told by type, never by name. The checks take about 50 microseconds for twelve blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import timm
import torch
from timm.layers import DropPath, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.format import Format
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.cost import BlockCost, linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts import SUPPORTED, refuse_type
from reducers.hosts.protocol import Core, Family, Grid, Host, HostBlock, PreNormBlock, Stage, StochasticDepth
from reducers.tokens import Layout, TokenBatch

_MODELS = (VisionTransformer, VisionTransformerDistilled)
_ROWWISE_MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)  # each token by itself; one that mixes tokens would be run wrongly
_ROWWISE = tuple(kind.forward for kind in _ROWWISE_MLPS)
_POOLS = ("token", "avg", "max", "avgmax", "map")
_STEPS = ("forward", "forward_features", "forward_head", "pool")  # of the model, restated by the driver and the head
_BLOCK, _ATTENTION = Block.forward, Attention.forward  # what the runtime restates
_DROP_PATHS = (nn.Identity, DropPath)


class TimmCore(Core):
    """timm's ``Attention``, every optional part honoured."""

    def __init__(self, attn: Attention, x: Tensor, layout: Layout) -> None:
        super().__init__(x, layout)
        self.attn = attn

    @property
    def scale(self) -> float:
        """timm's fused kernel goes by the head's width whatever ``attn.scale`` says."""
        attn = self.attn
        return float(attn.head_dim**-0.5 if attn.fused_attn else attn.scale)

    @property
    def dropout(self) -> float:
        attn = self.attn
        drops = attn.training if attn.fused_attn else attn.attn_drop.training
        return float(attn.attn_drop.p) if drops else 0.0

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn, parts = self.attn, last - first
        qkv, width = attn.qkv, attn.attn_dim
        bias = None if qkv.bias is None else qkv.bias.narrow(0, first * width, parts * width)
        out = F.linear(x, qkv.weight.narrow(0, first * width, parts * width), bias)
        found = out.view(x.shape[0], parts, attn.num_heads, attn.head_dim).unbind(1)
        norms = (attn.q_norm, attn.k_norm)[first:last]
        return (*(norm(part) for norm, part in zip(norms, found, strict=False)), *found[len(norms) :])

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        attn = self.attn
        out = attn.norm(summed)
        if attn.gate is not None:
            out = out * attn.gate(self.x if rows is None else self.x.index_select(0, rows)).sigmoid()
        added: Tensor = attn.proj_drop(attn.proj(out))
        return added


class TimmBlock(PreNormBlock):
    """timm's ``Block``."""

    module: Block
    trusted: ClassVar[tuple[str, ...]] = ("torch.nn.modules.", "timm.layers.")

    @property
    def cost(self) -> BlockCost:
        attn: Any = self.module.attn
        linear = attn.qkv.in_features * attn.attn_dim
        mlp_row = sum(layer.weight.numel() for layer in self.mlp.modules() if isinstance(layer, nn.Linear))
        output_row = linear * (2 if attn.gate is not None else 1)
        return BlockCost(linear, 2 * linear, attn.attn_dim, output_row, mlp_row)

    def norm(self, branch: int) -> nn.Module:
        norm: nn.Module = self.module.norm2 if branch else self.module.norm1
        return norm

    def scale(self, branch: int) -> Callable[[Tensor], Tensor]:
        scale: nn.Module = self.module.ls2 if branch else self.module.ls1
        return scale

    def depth(self, branch: int) -> StochasticDepth | None:
        path = self.module.drop_path2 if branch else self.module.drop_path1
        if not isinstance(path, DropPath) or not path.training or path.drop_prob == 0:
            return None
        return StochasticDepth(path.drop_prob, path.scale_by_keep)

    @property
    def mlp(self) -> nn.Module:
        mlp: nn.Module = self.module.mlp
        return mlp

    def attention(self, x: Tensor, batch: TokenBatch) -> TimmCore:
        attn = self.module.attn
        assert isinstance(attn, Attention)  # check saw to it
        return TimmCore(attn, x, batch.layout)

    def attention_ends(self) -> tuple[nn.Module, ...]:
        attn: Any = self.module.attn
        return attn.proj, attn.proj_drop


class TimmViT(Host):
    """timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

    model: VisionTransformer
    library: ClassVar[str] = "timm"
    families: ClassVar[tuple[Family, ...]] = (
        Family(
            "vision_transformer",
            "ViT, AugReg, CLIP, SigLIP, DINOv2, registers",
            refused={
                "attention and MLP side by side": (
                    "vit_base_patch16_18x2_224",
                    "vit_base_patch16_xp_224",
                    "vit_dpwee_patch16_reg1_gap_256",
                    "vit_huge_patch14_xp_224",
                    "vit_large_patch14_xp_224",
                    "vit_pwee_patch16_reg1_gap_256",
                    "vit_small_patch16_18x2_224",
                ),
                "norms behind attention and MLP": ("vit_base_patch16_rpn_224",),
                "differential attention": ("vit_dlittle_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"),
            },
        ),
        Family("deit", "DeiT, distilled DeiT, DeiT-III"),
        Family("vision_transformer_hybrid", "patches from a convolutional network"),
        Family("vitamin", "ViTamin: patches from a convolutional network, GeGLU in the MLP"),
    )

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        return list(timm.list_models(module=family.name))

    def check(self) -> None:
        check_model(self.model)

    @property
    def stages(self) -> tuple[Stage, ...]:
        model = self.model
        grid, first = model.patch_embed.grid_size, model.blocks[0]
        assert isinstance(first, Block) and isinstance(first.attn, Attention)  # check saw to it
        return (
            Stage(
                0,
                len(model.blocks) - 1,
                None if grid is None else (int(grid[0]), int(grid[1])),
                int(model.embed_dim),
                int(first.attn.num_heads),
                int(model.num_prefix_tokens),
                bool(model.has_class_token),
            ),
        )

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def classes(self) -> int:
        return int(self.model.num_classes)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def read_prefix(self) -> int | None:
        """Class and distillation token; registers are read by nobody."""
        if self.model.global_pool != "token":
            return None
        return int(self.model.num_prefix_tokens) - int(self.model.num_reg_tokens)

    @property
    def head_words(self) -> str:
        return f"global_pool={self.model.global_pool!r}"

    @property
    def channels(self) -> int:
        """Of the first convolution of the patch embedding, or of a hybrid's backbone."""
        convolutions = (layer for layer in self.model.patch_embed.modules() if isinstance(layer, nn.Conv2d))
        return next(convolutions).in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.model.patch_embed.img_size
        return int(height), int(width)

    @property
    def checkpoints(self) -> bool:
        return bool(self.model.grad_checkpointing)

    def grid_of(self, images: Tensor) -> Grid:
        rows, columns = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        return int(rows), int(columns)

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        height, width = int(images.shape[-2]), int(images.shape[-1])
        dynamic, embed = self.model.dynamic_img_size, self.model.patch_embed
        down, across = embed.feat_ratio(as_scalar=False)
        if not dynamic and (height, width) != tuple(embed.img_size):
            raise ReducerError(
                f"the images have {height} x {width} px and the model was made for {embed.img_size[0]} x "
                f"{embed.img_size[1]}; resize them, or create the model with dynamic_img_size=True"
            )
        if dynamic and not embed.dynamic_img_pad and (height % down or width % across):
            raise ReducerError(
                f"images of {height} x {width} px are no whole patches of {down} x {across}; resize them, or create "
                "the model with dynamic_img_pad=True"
            )
        return self.grid_of(images), (int(down), int(across))

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        model = self.model
        x = _embed(_entrance(model, resized=resized), images)
        return TokenBatch.from_images(
            x, prefix=model.num_prefix_tokens, has_class_token=model.has_class_token, track=track
        )

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return linear_macs(_entrance(self.model, resized=resized).patch_embed, images[:1])

    def block(self, index: int) -> HostBlock:
        block = self.model.blocks[index]
        assert isinstance(block, Block)  # check saw to it
        return TimmBlock(block)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout = batch.layout
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for block in self.model.blocks[first:last]:
            x = block(x)
        return replace(batch, x=x.flatten(0, 1))

    def classify(self, batch: TokenBatch) -> Tensor | tuple[Tensor, Tensor]:
        return _logits(self.model, batch, self.model.norm(batch.x))

    @property
    def classifier_macs(self) -> int:
        base = self.model
        heads = [base.head, base.head_dist] if isinstance(base, VisionTransformerDistilled) else [base.head]
        return sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))

    def head_macs(self, layout: Layout) -> Tensor:
        base, linear = self.model, float(self.classifier_macs)
        macs = torch.full((layout.images,), linear, dtype=torch.float64, device=layout.lengths.device)
        if base.global_pool != "map" or isinstance(base, VisionTransformerDistilled):
            return macs
        pool = base.attn_pool
        keys = (layout.lengths if base.pool_include_prefix else layout.patches).double()
        width = pool.num_heads * pool.head_dim
        rows = sum(p.numel() for n, p in pool.named_parameters() if p.dim() == 2 and not n.startswith("kv"))
        return macs + keys * pool.kv.weight.numel() + pool.latent_len * (rows + 2 * keys * width)

    def behind(self, block: int) -> Iterator[nn.Module]:
        yield self.model.blocks[block:]
        for name in ("norm", "attn_pool", "fc_norm", "head", "head_dist"):
            module = getattr(self.model, name, None)
            if isinstance(module, nn.Module):
                yield module


HOST = TimmViT


# --- whether a model can be driven ------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Refuse a model that could not be run exactly, saying why and what is supported."""
    if type(model) not in _MODELS:
        refuse_type(model)
    assert isinstance(model, VisionTransformer)
    blocks = model._modules["blocks"]
    if type(blocks) is not nn.Sequential:
        raise UnsupportedModel(
            f"the model holds its blocks in a {type(blocks).__name__}, not a Sequential. {SUPPORTED}."
        )
    _check_whole(model, "the model")
    _check_whole(blocks, "the model's blocks")
    replaced = [step for step in _STEPS if step in model.__dict__]
    if replaced:
        raise UnsupportedModel(
            f"the model's {replaced[0]} was replaced by another function, which would be bypassed; undo that. "
            f"{SUPPORTED}."
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModel(
            "the model drops patches by itself (patch_drop_rate > 0); create it with patch_drop_rate=0"
        )
    if Block.forward is not _BLOCK or Attention.forward is not _ATTENTION:
        raise UnsupportedModel(
            "the forward of timm's Block or Attention was replaced for the whole process, and the reduced model would "
            f"bypass the new one; undo that. {SUPPORTED}."
        )
    for index, block in enumerate(blocks._modules.values()):
        assert block is not None
        _check_block(index, block)
    _check_pool(model)


def _check_pool(model: VisionTransformer) -> None:
    if model.global_pool not in _POOLS:
        raise UnsupportedModel(
            f"global_pool={model.global_pool!r} is not supported; create the model with one of {', '.join(_POOLS)}"
        )
    if model.global_pool == "map":
        pool = model._modules["attn_pool"]
        if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None:
            raise UnsupportedModel(f"the attention pool {type(pool).__name__} is not supported. {SUPPORTED}.")


def _check_whole(module: nn.Module, where: str) -> None:
    """Refuse what rides on a module that is restated and not called: hooks of any kind, a forward of its own."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    if (before or after) and any(_acts(hook) for hook in (*before.values(), *after.values())):
        kind = "forward hook"
    elif module._backward_hooks or module._backward_pre_hooks:
        kind = "backward hook"
    elif "forward" in module.__dict__:
        raise UnsupportedModel(
            f"the forward of {where} was replaced by another function, which would be bypassed; undo that. {SUPPORTED}."
        )
    else:
        return
    owner, _, part = where.partition("'s ")
    raise UnsupportedModel(
        f"{owner} has a {kind}{f' on its {part}' if part else ''}, which would be bypassed; remove the hook, or make "
        "the pruning or weight norm permanent, first. Hooks on the reduced model and on parts that are called (norm1, "
        f"mlp, patch_embed, head, …) are run. {SUPPORTED}."
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
            f"call the model's set_grad_checkpointing() instead). {SUPPORTED}."
        )
    parts = block._modules
    attn, mlp = parts["attn"], parts["mlp"]
    if type(attn) is not Attention:
        raise UnsupportedModel(
            f"block {index} attends with {type(attn).__name__}, whose own steps would be bypassed (a sharded one: "
            f"shard the reduced model instead). {SUPPORTED}."
        )
    qkv, dropout = attn._modules["qkv"], attn._modules["attn_drop"]
    if type(qkv) is not nn.Linear:
        raise UnsupportedModel(
            f"block {index} has its qkv replaced by a {type(qkv).__name__}, which would be bypassed; "
            "merge it into a plain Linear first (LoRA, quantisation, parametrisation), and shard the reduced model "
            f"instead of it. {SUPPORTED}."
        )
    _check_whole(block, f"block {index}")
    _check_whole(attn, f"block {index}'s attn")
    _check_whole(qkv, f"block {index}'s attn.qkv")
    if type(dropout) is not nn.Dropout:
        raise UnsupportedModel(
            f"block {index} has its attn_drop replaced by a {type(dropout).__name__}, which would be bypassed; it must "
            f"be a plain Dropout. {SUPPORTED}."
        )
    _check_whole(dropout, f"block {index}'s attn.attn_drop")
    for name in ("drop_path1", "drop_path2"):
        path = parts[name]
        if type(path) not in _DROP_PATHS:
            raise UnsupportedModel(
                f"block {index} has its {name} replaced by a {type(path).__name__}, which would be bypassed; it must "
                f"be timm's DropPath or an Identity. {SUPPORTED}."
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
            f"token; replace the layers inside it instead. {SUPPORTED}."
        )


# --- images -> tokens -------------------------------------------------------------------------------------------------


def _entrance(base: VisionTransformer, *, resized: bool) -> VisionTransformer:
    """The model to embed images with: itself, or for resized ones a twin that shares every weight and interpolates
    positions.
    """
    if not resized or base.dynamic_img_size:
        return base
    if type(base.patch_embed) is not PatchEmbed:
        raise ReducerError(
            f"images cannot be resized for a model whose patches come from {type(base.patch_embed).__name__}; "
            "create the model with dynamic_img_size=True"
        )
    twin, patches = copy.copy(base), copy.copy(base.patch_embed)
    patches.strict_img_size, patches.flatten, patches.output_fmt = False, False, Format.NHWC
    twin._modules = {**base._modules, "patch_embed": patches}
    twin.__dict__["dynamic_img_size"] = True  # of the twin alone; timm declares it final
    return twin


def _embed(base: VisionTransformer, images: Tensor) -> Tensor:
    """Images -> the tokens that enter block 0, (B, N, D)."""
    if base.dynamic_img_size and images.shape[0] == 0:  # timm cannot tell how many positions to interpolate for
        return _embed(base, images.new_zeros(1, *images.shape[1:]))[:0]
    return base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images))))


# --- tokens -> logits -------------------------------------------------------------------------------------------------


def _logits(base: VisionTransformer, batch: TokenBatch, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Logits (B, classes) from the normed features x (T, D)."""
    if isinstance(base, VisionTransformerDistilled):
        return _classify_distilled(base, batch, x)
    logits: Tensor = base.head(base.head_drop(base.fc_norm(_pool(base, batch, x))))
    return logits


def _classify_distilled(
    base: VisionTransformerDistilled, batch: TokenBatch, x: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Class and distillation token each have a head; their logits are averaged, as timm does outside distilled
    training.
    """
    first = class_feature(base, batch, x)
    second = x[batch.layout.starts + (batch.cls >= 0)]  # next to the class token, or first where that was dropped
    by_class, by_distillation = base.head(base.head_drop(first)), base.head_dist(base.head_drop(second))
    if base.distilled_training and base.training:
        return by_class, by_distillation
    return (by_class + by_distillation) / 2


def class_feature(base: VisionTransformer, batch: TokenBatch, x: Tensor) -> Tensor:
    """(B, D) the class token; where an experiment let it be dropped, the mean of the survivors."""
    layout = batch.layout
    rows = x[batch.cls.clamp(min=0)]
    if layout.uniform is not None and layout.uniform[1] == base.num_prefix_tokens:
        return rows  # no image has lost a prefix token
    summed = torch.zeros(layout.images, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, layout.row_image, x)
    mean = summed / layout.lengths.clamp(min=1)[:, None].to(x.dtype)
    return torch.where((batch.cls >= 0)[:, None], rows, mean)


def _pool(base: VisionTransformer, batch: TokenBatch, x: Tensor) -> Tensor:
    layout, kind = batch.layout, base.global_pool
    if kind == "token":
        return class_feature(base, batch, x)
    first = torch.zeros_like(layout.prefix) if base.pool_include_prefix else layout.prefix
    valid = layout.valid_from(first)
    tokens = layout.pad(x, first)
    if tokens.shape[1] == 0:  # no image has a token left to pool
        return x.new_zeros(layout.images, x.shape[1])
    weight = batch.size
    if batch.alive is not None:  # what a training mask dropped is not pooled; where it dropped all, hard pools read all
        weight = weight * batch.alive
        alive = valid & (layout.pad(batch.alive, first) > 0.5)
        valid = torch.where(alive.any(1, keepdim=True), alive, valid) if kind != "avg" else valid
    if kind == "map":
        return _attention_pool(base, batch, tokens, valid, first)
    # a merged token stands for several patches, so the mean over patches weighs it by its size
    size = layout.pad(weight, first).to(x.dtype).masked_fill(~valid, 0)[..., None]
    mean = (tokens * size).sum(1) / size.sum(1).clamp(min=torch.finfo(x.dtype).tiny)
    if kind == "avg":
        return mean
    largest = tokens.masked_fill(~valid[..., None], -torch.inf).amax(1).masked_fill(~valid.any(1)[:, None], 0)
    return largest if kind == "max" else 0.5 * (largest + mean)


def _attention_pool(base: VisionTransformer, batch: TokenBatch, tokens: Tensor, valid: Tensor, first: Tensor) -> Tensor:
    """timm's latent attention pool, with padded keys masked and the key bias (log size) honoured."""
    layout, pool = batch.layout, base.attn_pool
    mask = None
    if layout.uniform is None or batch.key_bias is not None or batch.alive is not None:
        mask = torch.zeros(valid.shape, dtype=tokens.dtype, device=tokens.device)
        if batch.key_bias is not None:
            mask = layout.pad(batch.key_bias, first).to(tokens.dtype)
        mask = mask.masked_fill(~valid, -torch.inf)[:, None, None].expand(-1, -1, pool.latent_len, -1)
    pooled: Tensor = pool(tokens, attn_mask=mask)
    return pooled
