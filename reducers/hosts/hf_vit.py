"""Hugging Face's vision transformers: ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP's and SigLIP's vision towers.

Their layers are one pre-norm block under other names, which a ``Kind`` maps; models are told by exact type. Nothing
here imports transformers before a model of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reducers.cost import BlockCost, linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts.pools import class_or_mean, mean_of_patches
from reducers.hosts.protocol import (
    Call,
    Core,
    Family,
    Grid,
    Host,
    HostBlock,
    PreNormBlock,
    Stage,
    StochasticDepth,
)
from reducers.hosts.riding import riding
from reducers.hosts.rope import Rope, Turning
from reducers.tokens import Layout, TokenBatch

_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")  # what they compute is the runtime's own
_CAPTURES = "transformers.utils.output_capturing"  # whose hooks collect hidden states when they are asked for
_REMEDY = "load it with attn_implementation='sdpa', or call model.set_attn_implementation('sdpa')"


@dataclass(frozen=True)
class Kind:
    """One family's names of the parts of the block, and what its models differ in."""

    module: str  # of transformers.models
    layers: str  # of the tower
    layer: str  # class
    norms: tuple[str, str]
    attention: tuple[str, str]  # the layer's name of it, class
    out: str  # the attention's last projection
    heads: str
    scale: str
    dropped: str  # share of attention weights dropped in training
    mlps: tuple[str, ...]
    norm: str  # the tower's last norm
    patches: str  # the convolution, from the tower
    after: tuple[str, str] | None = None  # what a branch passes before the residual: LayerScale, or a Dropout
    prefix: int = 1
    entry: str | None = None  # the tower's norm before the first block
    normed: bool = True  # last_hidden_state has passed the last norm
    depth: bool = False  # has stochastic depth
    resizes: str = "asked"  # positions are interpolated where "asked", "always", or are "turned" (rope)

    def path(self, name: str) -> str:
        return f"transformers.models.{self.module}.modeling_{self.module}.{name}"


VIT = Kind(
    "vit", "layers", "ViTLayer", ("layernorm_before", "layernorm_after"), ("attention", "ViTAttention"), "o_proj",
    "num_attention_heads", "scaling", "attention_dropout", ("ViTMLP",), "layernorm",
    "embeddings.patch_embeddings.projection", after=("dropout", "dropout"),
)  # fmt: skip
_DEIT = replace(
    VIT, module="deit", layer="DeiTLayer", attention=("attention", "DeiTAttention"), mlps=("DeiTMLP",), prefix=2
)
_DINOV2 = replace(
    VIT, module="dinov2", layers="encoder.layer", layer="Dinov2Layer", norms=("norm1", "norm2"),
    attention=("attention", "Dinov2Attention"), mlps=("Dinov2MLP", "Dinov2SwiGLUFFN"),
    after=("layer_scale1", "layer_scale2"), depth=True, resizes="always",
)  # fmt: skip
_REGISTERS = replace(
    _DINOV2, module="dinov2_with_registers", layer="Dinov2WithRegistersLayer",
    attention=("attention", "Dinov2WithRegistersAttention"),
    mlps=("Dinov2WithRegistersMLP", "Dinov2WithRegistersSwiGLUFFN"),
)  # fmt: skip
_DINOV3 = replace(
    _DINOV2, module="dinov3_vit", layers="model.layer", layer="DINOv3ViTLayer",
    attention=("attention", "DINOv3ViTAttention"), heads="num_heads", dropped="dropout",
    mlps=("DINOv3ViTMLP", "DINOv3ViTGatedMLP"), norm="norm", patches="embeddings.patch_embeddings", resizes="turned",
)  # fmt: skip
_CLIP = Kind(
    "clip", "encoder.layers", "CLIPEncoderLayer", ("layer_norm1", "layer_norm2"), ("self_attn", "CLIPAttention"),
    "out_proj", "num_heads", "scale", "dropout", ("CLIPMLP",), "post_layernorm", "embeddings.patch_embedding",
    entry="pre_layrnorm", normed=False,
)  # fmt: skip
_SIGLIP = replace(
    _CLIP, module="siglip", layer="SiglipEncoderLayer", attention=("self_attn", "SiglipAttention"),
    mlps=("SiglipMLP",), prefix=0, entry=None, normed=True,
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A class of models: its kind, where the tower is in it, and how its head reads the tokens."""

    kind: Kind
    tower: str = ""  # "": the model itself
    reads: str = "class"  # "class" | "class and mean" | "mean" | "pool" (SigLIP's attention) | "both" (DeiT's teacher)


MODELS: dict[str, Made] = {
    VIT.path("ViTModel"): Made(VIT),
    VIT.path("ViTForImageClassification"): Made(VIT, "vit"),
    _DEIT.path("DeiTModel"): Made(_DEIT),
    _DEIT.path("DeiTForImageClassification"): Made(_DEIT, "deit"),
    _DEIT.path("DeiTForImageClassificationWithTeacher"): Made(_DEIT, "deit", "both"),
    _DINOV2.path("Dinov2Model"): Made(_DINOV2),
    _DINOV2.path("Dinov2ForImageClassification"): Made(_DINOV2, "dinov2", "class and mean"),
    _REGISTERS.path("Dinov2WithRegistersModel"): Made(_REGISTERS),
    _REGISTERS.path("Dinov2WithRegistersForImageClassification"): Made(
        _REGISTERS, "dinov2_with_registers", "class and mean"
    ),
    _DINOV3.path("DINOv3ViTModel"): Made(_DINOV3),
    _CLIP.path("CLIPVisionModel"): Made(_CLIP),
    _CLIP.path("CLIPVisionModelWithProjection"): Made(_CLIP, "vision_model"),
    _CLIP.path("CLIPForImageClassification"): Made(_CLIP, "vision_model", "mean"),
    _SIGLIP.path("SiglipVisionModel"): Made(_SIGLIP, "", "pool"),
    _SIGLIP.path("SiglipForImageClassification"): Made(_SIGLIP, "vision_model", "mean"),
}


class HFCore(Core):
    """Attention with a projection each for queries, keys and values, turned by places where the model does that."""

    def __init__(self, kind: Kind, attn: Any, x: Tensor, batch: TokenBatch) -> None:
        super().__init__(x, batch.layout)
        self.kind, self.attn = kind, attn

    @property
    def scale(self) -> float:
        return float(getattr(self.attn, self.kind.scale))

    @property
    def dropout(self) -> float:
        return float(getattr(self.attn, self.kind.dropped)) if self.attn.training else 0.0

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self.attn
        parts = (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]
        return tuple(part(x).unflatten(1, (-1, attn.head_dim)) for part in parts)

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        added: Tensor = getattr(self.attn, self.kind.out)(summed)
        return added


class HFTurnedCore(Turning, HFCore):
    """With rotary places, the same ones in every layer."""

    block = 0

    def __init__(self, kind: Kind, attn: Any, x: Tensor, batch: TokenBatch) -> None:
        super().__init__(kind, attn, x, batch)
        self.batch = batch


class HFBlock(PreNormBlock):
    """A layer of any of the families."""

    trusted: ClassVar[tuple[str, ...]] = ("torch.nn.modules.", "transformers.models.", "transformers.activations")

    def __init__(self, kind: Kind, module: nn.Module) -> None:
        super().__init__(module)
        self.kind = kind

    @property
    def attn(self) -> Any:
        return getattr(self.module, self.kind.attention[0])

    @property
    def cost(self) -> BlockCost:
        attn = self.attn
        query, key, value = (part.weight.numel() for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        mlp = sum(layer.weight.numel() for layer in self.mlp.modules() if isinstance(layer, nn.Linear))
        out = getattr(attn, self.kind.out).weight.numel()
        return BlockCost(query, key + value, attn.q_proj.out_features, out, mlp)

    def norm(self, branch: int) -> nn.Module:
        norm: nn.Module = getattr(self.module, self.kind.norms[branch])
        return norm

    def scale(self, branch: int) -> Callable[[Tensor], Tensor] | None:
        if self.kind.after is None:
            return None
        scale: nn.Module = getattr(self.module, self.kind.after[branch])
        return scale

    def depth(self, branch: int) -> StochasticDepth | None:
        if not self.kind.depth:
            return None
        path: Any = self.module.drop_path
        if isinstance(path, nn.Identity) or not path.training or path.drop_prob == 0:
            return None
        return StochasticDepth(path.drop_prob)

    @property
    def mlp(self) -> nn.Module:
        mlp: nn.Module = self.module.mlp  # type: ignore[assignment]
        return mlp

    def attention(self, x: Tensor, batch: TokenBatch) -> HFCore:
        core = HFTurnedCore if self.kind.resizes == "turned" else HFCore
        return core(self.kind, self.attn, x, batch)

    def attention_ends(self) -> tuple[nn.Module, ...]:
        return (getattr(self.attn, self.kind.out),)


class HFViT(Host):
    """A model of transformers, as a whole or its vision tower alone."""

    table: ClassVar[Mapping[str, Made]] = MODELS
    takes: ClassVar[frozenset[str]] = frozenset(
        ("pixel_values", "labels", "interpolate_pos_encoding", "return_dict", "restore")
    )
    read_as: ClassVar[str] = "(B, C, H, W)"
    library: ClassVar[str] = "transformers"
    families: ClassVar[tuple[Family, ...]] = (
        Family("vit", "ViT"),
        Family("deit", "DeiT, distilled with a head for each token"),
        Family("dinov2", "DINOv2"),
        Family("dinov2_with_registers", "DINOv2 with registers"),
        Family("dinov3_vit", "DINOv3's vision transformers", travels="each token's place, by which rope turns it"),
        Family("clip", "CLIP's vision tower"),
        Family("siglip", "SigLIP's vision tower"),
    )

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        """Classes, for there are no names of models."""
        return [path.rpartition(".")[2] for path, made in cls.table.items() if made.kind.module == family.name]

    @cached_property
    def made(self) -> Made:
        kind = type(self.model)
        return self.table[f"{kind.__module__}.{kind.__qualname__}"]

    @property
    def kind(self) -> Kind:
        return self.made.kind

    @property
    def tower(self) -> Any:
        return getattr(self.model, self.made.tower) if self.made.tower else self.model

    @property
    def layers(self) -> Any:
        return part_of(self.tower, self.kind.layers)

    def check(self) -> None:
        _check(self.model, self.tower, self.kind)

    # --- facts ---

    @property
    def stages(self) -> tuple[Stage, ...]:
        kind, layers, patch = self.kind, self.layers, part_of(self.tower, self.kind.patches)
        rows, columns = (side // size for side, size in zip(self.image_size, patch.kernel_size, strict=True))
        heads = int(getattr(getattr(layers[0], kind.attention[0]), kind.heads))
        registers = getattr(self.tower.embeddings, "register_tokens", None)
        prefix = kind.prefix + (0 if registers is None else int(registers.shape[1]))
        return (Stage(0, len(layers) - 1, (rows, columns), patch.out_channels, heads, prefix, kind.prefix > 0),)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def classes(self) -> int:
        heads = self._heads()
        return heads[0].out_features if heads and isinstance(heads[0], nn.Linear) else 0

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = getattr(self.tower, self.kind.norm)
        return norm

    @property
    def read_prefix(self) -> int | None:
        return {"class": 1, "both": 2}.get(self.made.reads)

    @property
    def channels(self) -> int:
        return int(part_of(self.tower, self.kind.patches).in_channels)

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.tower.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def checkpoints(self) -> bool:
        return any(layer.gradient_checkpointing for layer in self.layers)

    # --- images ---

    def grid_of(self, images: Tensor) -> Grid:
        down, across = part_of(self.tower, self.kind.patches).kernel_size
        return int(images.shape[-2]) // int(down), int(images.shape[-1]) // int(across)

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        down, across = part_of(self.tower, self.kind.patches).kernel_size
        return self.grid_of(images), (int(down), int(across))

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        tower, kind = self.tower, self.kind
        self._check_images(images, resized)
        images = images.to(part_of(tower, kind.patches).weight.dtype)
        options = {"interpolate_pos_encoding": resized} if kind.resizes == "asked" else {}
        x = tower.embeddings(images, **options)
        if kind.entry is not None:
            x = getattr(tower, kind.entry)(x)
        stage = self.stages[0]
        turned = kind.resizes == "turned"
        batch = TokenBatch.from_images(
            x, prefix=stage.prefix, has_class_token=stage.has_class_token, track=track or turned
        )
        if not turned:
            return batch
        cosine, sine = tower.rope_embeddings(images)
        # pairs are the first and the second half of a head's features
        return replace(batch, tables=Rope.of(torch.cat([sine, cosine], dim=-1)[:, None], batch, half=True))

    def relocated(self, tables: Rope | None, original: Tensor, patches: int) -> Rope | None:
        return None if tables is None else tables.relocated(original, patches)

    def _check_images(self, images: Tensor, resized: bool) -> None:
        height, width = (int(side) for side in images.shape[-2:])
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ReducerError(
                f"the model reads images (B, {self.channels}, H, W); got {tuple(images.shape)}: prepare them as its "
                "processor does"
            )
        if self.kind.resizes == "asked" and not resized and (height, width) != self.image_size:
            raise ReducerError(
                f"the images have {height} x {width} px and the model was made for {self.image_size[0]} x "
                f"{self.image_size[1]}; resize them, or call fast(pixel_values=…, interpolate_pos_encoding=True)"
            )

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        convolution = part_of(self.tower, self.kind.patches)
        return linear_macs(convolution, images[:1].to(convolution.weight.dtype))

    # --- blocks ---

    def block(self, index: int) -> HostBlock:
        return HFBlock(self.kind, self.layers[index])

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout = batch.layout
        if self.kind.resizes == "turned" or not layout.rows:
            return None  # the library turns all patches of the grid, and some may be gone; it cannot view no token
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for layer in self.layers[first:last]:
            x = layer(x, None)
        return replace(batch, x=x.flatten(0, 1))

    # --- the head ---

    def token_features(self, x: Tensor) -> Tensor:
        """As ``last_hidden_state`` has them: CLIP's have not passed the last norm."""
        return super().token_features(x) if self.kind.normed else x

    def pooled(self, batch: TokenBatch) -> Tensor:
        """What the classifier or projection reads; of a bare tower its ``pooler_output``, and where it has none the
        class token, or the mean of the patches.
        """
        reads, model = self.made.reads, self.model
        if reads == "both":
            first, second = self._both(batch)
            return (first + second) / 2
        if reads == "pool":
            return self._attention_pool(batch) if model.use_head else mean_of_patches(batch, self._normed(batch))
        if reads == "mean":
            return mean_of_patches(batch, self.token_features(batch.x))
        x = self._normed(batch)
        first = class_or_mean(batch, x, self.stages[0].prefix)
        if reads == "class and mean":
            return torch.cat([first, mean_of_patches(batch, x)], dim=1)
        pooler = model._modules.get("pooler")
        if pooler is None:
            return first
        pooled: Tensor = pooler(first[:, None])
        return pooled

    def _normed(self, batch: TokenBatch) -> Tensor:
        normed: Tensor = self.final_norm(batch.x)
        return normed

    def _both(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        x = self._normed(batch)
        second = x[batch.layout.starts + (batch.cls >= 0)]  # next to the class token, or first where that was dropped
        return class_or_mean(batch, x, self.stages[0].prefix), second

    def _attention_pool(self, batch: TokenBatch) -> Tensor:
        """SigLIP's: one learned query over the tokens, padded ones masked and the key bias (log size) honoured."""
        head, layout = self.model.head, batch.layout
        tokens, valid = layout.pad(self._normed(batch)), layout.valid
        if tokens.shape[1] == 0:  # no image has a token left to pool
            return tokens.new_zeros(layout.images, tokens.shape[2])
        alive = valid
        if batch.alive is not None:  # what a training mask dropped is not pooled, unless it dropped all
            alive = valid & (layout.pad(batch.alive) > 0.5)
            alive = torch.where(alive.any(1, keepdim=True), alive, valid)
        mask = None
        if layout.uniform is None or batch.key_bias is not None or batch.alive is not None:
            mask = torch.zeros(valid.shape, dtype=tokens.dtype, device=tokens.device)
            if batch.key_bias is not None:
                mask = layout.pad(batch.key_bias).to(tokens.dtype)
            mask = mask.masked_fill(~alive, -torch.inf)[:, None].expand(-1, head.attention.num_heads, -1)
            mask = mask.flatten(0, 1)[:, None]  # (B H, 1, L)
        probe = head.probe.expand(layout.images, -1, -1)
        x = head.attention(probe, tokens, tokens, attn_mask=mask, need_weights=False)[0]
        found: Tensor = (x + head.mlp(head.layernorm(x)))[:, 0]
        return found

    def _heads(self) -> list[Any]:
        """The linear layers that make logits of pooled features, as the class has them."""
        names = ("cls_classifier", "distillation_classifier", "classifier", "visual_projection")
        return [self.model._modules[name] for name in names if name in self.model._modules]

    def classify(self, batch: TokenBatch) -> Tensor:
        """Logits, CLIP's projected embedding, or of a bare tower the pooled features."""
        if self.made.reads == "both":
            return sum(self._both_logits(batch)) / 2  # type: ignore[return-value]
        pooled = self.pooled(batch)
        heads = self._heads()
        return heads[0](pooled) if heads else pooled

    def _both_logits(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        first, second = self._both(batch)
        return self.model.cls_classifier(first), self.model.distillation_classifier(second)

    @property
    def classifier_macs(self) -> int:
        return sum(head.weight.numel() for head in self._heads() if isinstance(head, nn.Linear))

    def head_macs(self, layout: Layout) -> Tensor:
        macs = super().head_macs(layout)
        if self.made.reads == "pool" and self.model.use_head:
            head, keys = self.model.head, layout.lengths.double()
            width = head.attention.embed_dim
            mlp = sum(layer.weight.numel() for layer in head.mlp.modules() if isinstance(layer, nn.Linear))
            macs = macs + keys * (2 * width**2 + 2 * width) + 2 * width**2 + mlp
        pooler = self.model._modules.get("pooler")
        return macs if pooler is None else macs + float(pooler.dense.weight.numel())

    def behind(self, block: int) -> Iterator[nn.Module]:
        yield from self.layers[block:]
        yield self.final_norm
        for name in ("pooler", "head"):
            module = self.model._modules.get(name)
            if module is not None:
                yield module
        yield from self._heads()

    # --- a call as the library has it ---

    def asked(self, images: Tensor | None, named: Mapping[str, Any]) -> Call:
        known, name = self.takes, type(self.model).__name__
        given = {key: value for key, value in named.items() if value is not None}
        if wrong := sorted(set(given) - known):
            raise ReducerError(
                f"a reduced {name} does not answer {wrong[0]}=…; it takes {', '.join(sorted(known))}: ask the plain "
                "model, or fast.trace(pixel_values) for what happened to the tokens"
            )
        pixels = given.get("pixel_values", images)
        if pixels is None or (images is not None and "pixel_values" in given):
            raise ReducerError(f"a reduced {name} is called as fast(pixel_values=…), {self.read_as}")
        tokens = "last_hidden_state" in self._names()
        if "restore" in given and not tokens:
            raise ReducerError(
                f"{name} returns no last_hidden_state, so there is nothing to restore; leave restore out"
            )
        if "labels" in given and "loss" not in self._names():
            raise ReducerError(f"{name} computes no loss; leave labels out")
        resized = bool(given.get("interpolate_pos_encoding", False))
        restore = given.get("restore", "owner") if tokens else None
        return Call(pixels, restore, resized, {key: given[key] for key in ("labels", "return_dict") if key in given})

    def _names(self) -> tuple[str, ...]:
        """Of what the class returns and a reduced model gives."""
        if self.made.reads == "both":
            return "logits", "cls_logits", "distillation_logits"
        if "classifier" in self.model._modules:
            return "loss", "logits"
        if "visual_projection" in self.model._modules:
            return "image_embeds", "last_hidden_state"
        return "last_hidden_state", "pooler_output"

    def answer(self, batch: TokenBatch, call: Call, tokens: Callable[[], Tensor] | None) -> Any:
        model, names = self.model, self._names()
        found: dict[str, Any] = {}
        if self.made.reads == "both":
            first, second = self._both_logits(batch)
            found = {"logits": (first + second) / 2, "cls_logits": first, "distillation_logits": second}
        elif "logits" in names:
            found["logits"] = self.classify(batch)
            if "labels" in call.options:
                found["loss"] = model.loss_function(call.options["labels"], found["logits"], model.config)
        else:
            assert tokens is not None
            found["last_hidden_state"] = tokens()
            if "image_embeds" in names:
                found["image_embeds"] = self.classify(batch)
            elif "pooler_output" not in names:
                pass
            elif self.made.reads == "pool":
                found["pooler_output"] = self.pooled(batch) if model.use_head else None
            else:
                pools = getattr(model, "pooler", self) is not None  # a ViTModel may have been made without it
                found["pooler_output"] = self.pooled(batch) if pools else None
        output = _output_class(self.made, names)(**found)
        as_it_is = call.options.get("return_dict", getattr(model.config, "return_dict", True))
        return output if as_it_is else output.to_tuple()


HOST = HFViT


def part_of(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _output_class(made: Made, names: tuple[str, ...]) -> Any:
    """The class of the library's own answers."""
    if made.reads == "both":
        return import_module(made.kind.path("")[:-1]).DeiTForImageClassificationWithTeacherOutput
    if "image_embeds" in names:
        return import_module(made.kind.path("")[:-1]).CLIPVisionModelOutput
    outputs = import_module("transformers.modeling_outputs")
    if "logits" in names:
        return outputs.ImageClassifierOutput
    return outputs.BaseModelOutputWithPooling if "pooler_output" in names else outputs.BaseModelOutput


# --- whether a model can be driven ------------------------------------------------------------------------------------


def _check(model: Any, tower: Any, kind: Kind) -> None:
    """Refuse what the runtime would bypass: every part that is restated and not called must be the library's own."""
    name = type(model).__name__
    check_whole(model, name)
    if tower is not model:
        check_whole(tower, f"{name}'s tower")
    check_implementation(tower, name)
    for index, layer in enumerate(part_of(tower, kind.layers)):
        check_layer(index, layer, kind)


def check_implementation(tower: Any, name: str) -> None:
    """Refuse a way to attend of which it is not known what it computes."""
    implementation = getattr(tower.config, "_attn_implementation", None)
    if implementation is not None and implementation not in _ATTENTIONS:
        raise UnsupportedModel(
            f"{name} attends by attn_implementation={implementation!r}, whose own steps would be bypassed; {_REMEDY}"
        )


def check_layer(index: int, layer: nn.Module, kind: Kind) -> None:
    where = f"layer {index}"
    if qualified(layer) != kind.path(kind.layer):
        raise UnsupportedModel(
            f"{where} is a {type(layer).__name__}, not transformers' {kind.layer}, and steps of its own would be "
            "bypassed; put the plain layer back, and wrap, shard or compile the reduced model instead"
        )
    check_whole(layer, where)
    attn, mlp = layer._modules[kind.attention[0]], layer._modules["mlp"]
    if attn is None or qualified(attn) != kind.path(kind.attention[1]):
        raise UnsupportedModel(
            f"{where} attends with {type(attn).__name__}, not transformers' {kind.attention[1]}, whose own steps would "
            "be bypassed; put the plain attention back (merge an adapter first)"
        )
    check_whole(attn, f"{where}'s attention")
    if mlp is None or qualified(mlp) not in map(kind.path, kind.mlps) or "forward" in mlp.__dict__:
        raise UnsupportedModel(
            f"{where} has the MLP {type(mlp).__name__}, which is not known to act token by token; replace the layers "
            f"inside {kind.mlps[0]} instead"
        )
    path = layer._modules.get("drop_path")
    if kind.depth and type(path) is not nn.Identity and not type(path).__name__.endswith("DropPath"):
        raise UnsupportedModel(
            f"{where} has its drop_path replaced by a {type(path).__name__}, which would be bypassed; put the "
            "library's own back"
        )


def check_whole(module: nn.Module, where: str) -> None:
    """Refuse what rides on a module that is restated and not called: hooks of any kind, a forward of its own."""
    kind = riding(module, _CAPTURES)
    if kind == "forward":
        raise UnsupportedModel(
            f"the forward of {where} was replaced by another function, which would be bypassed (device_map=… does "
            "that too); load the model without it, and move the reduced one"
        )
    if kind is not None:
        raise UnsupportedModel(
            f"{where} has a {kind}, which would be bypassed; remove it, or hook a part that is called (norms, mlp, "
            "projections, embeddings), or the reduced model"
        )


def qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
