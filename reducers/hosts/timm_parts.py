"""What timm's transformers have in common whatever their blocks are: facts, pools, and what is looked at before one is
driven.

Whatever is restated and not called must be seen to be as it was made: by type, without hooks, its ``forward`` its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import timm
import torch
from timm.layers import DropPath, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.format import Format
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.cost import linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts import SUPPORTED, refuse_type
from reducers.hosts.pools import class_or_mean
from reducers.hosts.protocol import Family, Grid, Host, Stage, StochasticDepth
from reducers.hosts.riding import riding
from reducers.tokens import Layout, TokenBatch

_ROWWISE_MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)  # each token by itself; one that mixes tokens would be run wrongly
_ROWWISE = tuple(kind.forward for kind in _ROWWISE_MLPS)
_POOLS = ("token", "avg", "max", "avgmax", "map")
_STEPS = ("forward", "forward_features", "forward_head", "pool")  # of the model, restated by the driver and the head
_DROP_PATHS = (nn.Identity, DropPath)


class TimmHost(Host):
    """A model of timm with its blocks in one row and its head behind a pool."""

    library: ClassVar[str] = "timm"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()  # the models that are driven, by exact type
    blocks_in: ClassVar[type[nn.Module]] = nn.Sequential  # what the model holds its blocks in

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        return list(timm.list_models(module=family.name))

    # --- whether it can be driven ---

    def check(self) -> None:
        model = self.model
        self.check_model("blocks")
        if (drop := getattr(model, "patch_drop", None)) is not None and not isinstance(drop, nn.Identity):
            raise UnsupportedModel(
                "the model drops patches by itself (patch_drop_rate > 0); create it with patch_drop_rate=0"
            )
        self.check_restated()
        for index, block in enumerate(model._modules["blocks"]._modules.values()):
            assert block is not None
            self.check_block(index, block)
        check_pool(model)

    def check_model(self, held: str) -> None:
        """Refuse a model that is not of these kinds, or which rides on; ``held``: the name of what holds its blocks."""
        model = self.model
        if type(model) not in self.kinds:
            refuse_type(model)
        check_holder(model._modules[held], self.blocks_in, "the model")
        check_whole(model, "the model")
        check_whole(model._modules[held], f"the model's {held}")
        replaced = [step for step in _STEPS if step in model.__dict__]
        if replaced:
            raise UnsupportedModel(
                f"the model's {replaced[0]} was replaced by another function, which would be bypassed; undo that. "
                f"{SUPPORTED}."
            )

    def check_restated(self) -> None:
        """Refuse where the forward of a class that is restated was replaced for the whole process."""

    def check_block(self, index: int, block: nn.Module) -> None:
        """Refuse a block that is not restated as it is."""
        raise NotImplementedError

    # --- facts ---

    @property
    def patcher(self) -> Any:
        """The module that makes patches of images."""
        return self.model.patch_embed

    @property
    def class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return bool(self.model.has_class_token)

    @property
    def takes_sizes(self) -> bool:
        """Whether the model takes images of other sizes by itself."""
        return bool(self.model.dynamic_img_size)

    @property
    def own_grid(self) -> Grid | None:
        """Rows and columns of patches that the model was made for."""
        grid = self.patcher.grid_size
        return None if grid is None else (int(grid[0]), int(grid[1]))

    @property
    def pools_prefix(self) -> bool:
        """Whether a pool over patches takes prefix tokens in."""
        return False

    @property
    def stages(self) -> tuple[Stage, ...]:
        model = self.model
        heads = model.blocks[0].attn.num_heads
        prefix = int(model.num_prefix_tokens)
        return (
            Stage(0, len(model.blocks) - 1, self.own_grid, int(model.embed_dim), int(heads), prefix, self.class_token),
        )

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def classes(self) -> int:
        return int(self.model.num_classes)

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.model.norm
        return norm

    @property
    def read_prefix(self) -> int | None:
        """The class token; registers are read by nobody."""
        return 1 if self.model.global_pool == "token" else None

    @property
    def head_words(self) -> str:
        return f"global_pool={self.model.global_pool!r}"

    @property
    def channels(self) -> int:
        """Of the first convolution of the patch embedding, or of a hybrid's backbone."""
        convolutions = (layer for layer in self.patcher.modules() if isinstance(layer, nn.Conv2d))
        return next(convolutions).in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.patcher.img_size
        return int(height), int(width)

    @property
    def checkpoints(self) -> bool:
        return bool(self.model.grad_checkpointing)

    def grid_of(self, images: Tensor) -> Grid:
        rows, columns = self.patcher.dynamic_feat_size(images.shape[-2:])
        return int(rows), int(columns)

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        height, width = int(images.shape[-2]), int(images.shape[-1])
        dynamic, embed = self.takes_sizes, self.patcher
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

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return linear_macs(self.patcher, images[:1])

    # --- the head ---

    def classify(self, batch: TokenBatch) -> Any:
        return self.model.head(self.pooled(batch))

    def pooled(self, batch: TokenBatch) -> Tensor:
        """As ``forward_head(…, pre_logits=True)``."""
        model = self.model
        pooled: Tensor = model.head_drop(model.fc_norm(self.pool(batch, model.norm(batch.x))))
        return pooled

    def pool(self, batch: TokenBatch, x: Tensor) -> Tensor:
        """(B, D) what the head reads of the normed features x (T, D)."""
        model = self.model
        if model.global_pool == "token":
            return class_or_mean(batch, x, int(model.num_prefix_tokens))
        pool = model.attn_pool if model.global_pool == "map" else None
        return pool_patches(batch, x, model.global_pool, prefix=self.pools_prefix, attention=pool)

    @property
    def classifier_macs(self) -> int:
        head = self.model.head
        return int(head.weight.numel()) if isinstance(head, nn.Linear) else 0

    def head_macs(self, layout: Layout) -> Tensor:
        model, linear = self.model, float(self.classifier_macs)
        macs = torch.full((layout.images,), linear, dtype=torch.float64, device=layout.lengths.device)
        if model.global_pool != "map":
            return macs
        return macs + attention_pool_macs(model.attn_pool, layout.lengths if self.pools_prefix else layout.patches)

    def behind(self, block: int) -> Iterator[nn.Module]:
        yield self.model.blocks[block:]
        for name in ("norm", "attn_pool", "fc_norm", "head", "head_dist"):
            module = getattr(self.model, name, None)
            if isinstance(module, nn.Module):
                yield module


# --- what is looked at ------------------------------------------------------------------------------------------------


def check_holder(holder: Any, kind: type[nn.Module], owner: str) -> None:
    """Refuse blocks that lie in another container."""
    if type(holder) is not kind:
        raise UnsupportedModel(
            f"{owner} holds its blocks in a {type(holder).__name__}, not a {kind.__name__}. {SUPPORTED}."
        )


def check_pool(model: Any) -> None:
    """Refuse a pool that is not restated."""
    if model.global_pool not in _POOLS:
        raise UnsupportedModel(
            f"global_pool={model.global_pool!r} is not supported; create the model with one of {', '.join(_POOLS)}"
        )
    if model.global_pool == "map":
        pool = model._modules["attn_pool"]
        if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None:
            raise UnsupportedModel(f"the attention pool {type(pool).__name__} is not supported. {SUPPORTED}.")


def check_whole(module: nn.Module, where: str) -> None:
    """Refuse what rides on a module that is restated and not called: hooks of any kind, a forward of its own."""
    kind = riding(module)
    if kind is None:
        return
    if kind == "forward":
        raise UnsupportedModel(
            f"the forward of {where} was replaced by another function, which would be bypassed; undo that. {SUPPORTED}."
        )
    owner, _, part = where.partition("'s ")
    raise UnsupportedModel(
        f"{owner} has a {kind}{f' on its {part}' if part else ''}, which would be bypassed; remove the hook, or make "
        "the pruning or weight norm permanent, first. Hooks on the reduced model and on parts that are called (norm1, "
        f"mlp, patch_embed, head, …) are run. {SUPPORTED}."
    )


def check_unreplaced(*restated: tuple[type[nn.Module], Callable[..., Any]]) -> None:
    """Refuse where the forward of a class is no longer the one that is restated."""
    if any(kind.forward is not forward for kind, forward in restated):
        names = " or ".join(kind.__name__ for kind, _ in restated)
        raise UnsupportedModel(
            f"the forward of timm's {names} was replaced for the whole process, and the reduced model would "
            f"bypass the new one; undo that. {SUPPORTED}."
        )


def check_kind(index: int, block: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Refuse a block of another type."""
    if type(block) not in kinds:
        raise UnsupportedModel(
            f"block {index} is a {type(block).__name__}, which has another order of work, or steps of its own that "
            "would be bypassed (a compiled, sharded or checkpointing wrapper: compile or shard the reduced model, and "
            f"call the model's set_grad_checkpointing() instead). {SUPPORTED}."
        )


def check_attention(index: int, block: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Refuse an attention of another type, or one whose parts that are restated were replaced."""
    attn: Any = block._modules["attn"]
    if type(attn) not in kinds:
        raise UnsupportedModel(
            f"block {index} attends with {type(attn).__name__}, whose own steps would be bypassed (a sharded one: "
            f"shard the reduced model instead). {SUPPORTED}."
        )
    qkv, dropout = attn._modules.get("qkv"), attn._modules["attn_drop"]  # Sapiens2 and some EVA-02 have no qkv
    if qkv is not None and type(qkv) is not nn.Linear:
        raise UnsupportedModel(
            f"block {index} has its qkv replaced by a {type(qkv).__name__}, which would be bypassed; "
            "merge it into a plain Linear first (LoRA, quantisation, parametrisation), and shard the reduced model "
            f"instead of it. {SUPPORTED}."
        )
    check_whole(block, f"block {index}")
    check_whole(attn, f"block {index}'s attn")
    if qkv is not None:
        check_whole(qkv, f"block {index}'s attn.qkv")
    if type(dropout) is not nn.Dropout:
        raise UnsupportedModel(
            f"block {index} has its attn_drop replaced by a {type(dropout).__name__}, which would be bypassed; it must "
            f"be a plain Dropout. {SUPPORTED}."
        )
    check_whole(dropout, f"block {index}'s attn.attn_drop")


def check_rest(index: int, block: nn.Module) -> None:
    """Refuse replaced stochastic depth, and an MLP that is not known to act token by token."""
    parts = block._modules
    for name in ("drop_path1", "drop_path2"):
        path = parts[name]
        if type(path) not in _DROP_PATHS:
            raise UnsupportedModel(
                f"block {index} has its {name} replaced by a {type(path).__name__}, which would be bypassed; it must "
                f"be timm's DropPath or an Identity. {SUPPORTED}."
            )
        assert path is not None
        check_whole(path, f"block {index}'s {name}")
    mlp = parts["mlp"]
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


# --- images of another size -------------------------------------------------------------------------------------------


def entrance(base: Any, *, resized: bool) -> Any:
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


# --- parts of blocks --------------------------------------------------------------------------------------------------


def stochastic_depth(path: nn.Module) -> StochasticDepth | None:
    """What timm's ``DropPath`` drops now."""
    if not isinstance(path, DropPath) or not path.training or path.drop_prob == 0:
        return None
    return StochasticDepth(path.drop_prob, path.scale_by_keep)


def attention_dropout(attn: Any) -> float:
    """The share of attention weights that timm's attention drops now."""
    drops = attn.training if attn.fused_attn else attn.attn_drop.training
    return float(attn.attn_drop.p) if drops else 0.0


def fused_parts(attn: Any, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Parts ``first`` … ``last - 1`` of timm's one projection; EVA and BEiT keep its biases beside it."""
    width, parts = attn.qkv.out_features // 3, last - first
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    bias = None if bias is None else bias.narrow(0, first * width, parts * width)
    return F.linear(x, attn.qkv.weight.narrow(0, first * width, parts * width), bias).split(width, dim=-1)


def mlp_row(mlp: nn.Module) -> int:
    """Multiply-adds of one token through an MLP."""
    return sum(layer.weight.numel() for layer in mlp.modules() if isinstance(layer, nn.Linear))


# --- tokens -> what the head reads ------------------------------------------------------------------------------------


def pool_patches(
    batch: TokenBatch, x: Tensor, kind: str, *, prefix: bool = False, attention: AttentionPoolLatent | None = None
) -> Tensor:
    """(B, D) timm's pools "avg", "max", "avgmax" and "map" (with the module ``attention``) of the patches, or with
    ``prefix`` of all tokens.
    """
    layout = batch.layout
    first = torch.zeros_like(layout.prefix) if prefix else layout.prefix
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
        assert attention is not None
        return _attention_pool(attention, batch, tokens, valid, first)
    # a merged token stands for several patches, so the mean over patches weighs it by its size
    size = layout.pad(weight, first).to(x.dtype).masked_fill(~valid, 0)[..., None]
    mean = (tokens * size).sum(1) / size.sum(1).clamp(min=torch.finfo(x.dtype).tiny)
    if kind == "avg":
        return mean
    largest = tokens.masked_fill(~valid[..., None], -torch.inf).amax(1).masked_fill(~valid.any(1)[:, None], 0)
    return largest if kind == "max" else 0.5 * (largest + mean)


def _attention_pool(
    pool: AttentionPoolLatent, batch: TokenBatch, tokens: Tensor, valid: Tensor, first: Tensor
) -> Tensor:
    """timm's latent attention pool, with padded keys masked and the key bias (log size) honoured."""
    layout = batch.layout
    mask = None
    if layout.uniform is None or batch.key_bias is not None or batch.alive is not None:
        mask = torch.zeros(valid.shape, dtype=tokens.dtype, device=tokens.device)
        if batch.key_bias is not None:
            mask = layout.pad(batch.key_bias, first).to(tokens.dtype)
        mask = mask.masked_fill(~valid, -torch.inf)[:, None, None].expand(-1, -1, pool.latent_len, -1)
    pooled: Tensor = pool(tokens, attn_mask=mask)
    return pooled


def attention_pool_macs(pool: Any, keys: Tensor) -> Tensor:
    """Multiply-adds of timm's latent attention pool over so many keys, (B,) float64."""
    keys, width = keys.double(), pool.num_heads * pool.head_dim
    rows = sum(p.numel() for n, p in pool.named_parameters() if p.dim() == 2 and not n.startswith("kv"))
    return keys * pool.kv.weight.numel() + pool.latent_len * (rows + 2 * keys * width)
