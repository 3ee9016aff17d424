"""Hugging Face's video models that attend over a whole clip at once: ViViT and VideoMAE.

A clip is one unit, whose patches are tubelets: each several frames deep. They are numbered step by step in time, so
that a clip looks to a reducer like an image in which the steps lie one below the other. Nothing here imports
transformers before a model of it is there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers.cost import BlockCost, linear_macs
from reducers.errors import ReducerError, UnsupportedModel
from reducers.frames import spread_steps
from reducers.hosts.hf_vit import (
    VIT,
    HFBlock,
    HFCore,
    HFViT,
    Kind,
    Made,
    check_implementation,
    check_whole,
    part_of,
    qualified,
)
from reducers.hosts.protocol import Family, Grid, Host, HostBlock, Stage
from reducers.reducer import Input
from reducers.tokens import TokenBatch

_VIVIT = replace(
    VIT, module="vivit", layer="VivitLayer", attention=("attention", "VivitAttention"), mlps=("VivitMLP",),
    resizes="never",
)  # fmt: skip
_VIDEOMAE = replace(
    VIT, module="videomae", layers="encoder.layer", layer="VideoMAELayer", prefix=0, after=None, resizes="never",
    attention=("attention", "VideoMAEAttention"), mlps=("VideoMAEIntermediate",), dropped="dropout_prob",
)  # fmt: skip
CLIP_MODELS: dict[str, Made] = {
    _VIVIT.path("VivitModel"): Made(_VIVIT),
    _VIVIT.path("VivitForVideoClassification"): Made(_VIVIT, "vivit"),
    _VIDEOMAE.path("VideoMAEModel"): Made(_VIDEOMAE, "", "mean"),
    _VIDEOMAE.path("VideoMAEForVideoClassification"): Made(_VIDEOMAE, "videomae", "mean"),
}


class OwnBlock(HFBlock):
    """A layer that holds its attention and its MLP in two parts each, as BERT's do: ``attention.attention``,
    ``attention.output``, ``intermediate`` and ``output``.
    """

    @property
    def attn(self) -> Any:
        return self.module.attention.attention  # type: ignore[union-attr]

    @property
    def attn_out(self) -> Any:
        return self.module.attention.output  # type: ignore[union-attr]

    def attention_ends(self) -> tuple[nn.Module, ...]:
        return (self.attn_out,)


class VideoMAECore(HFCore):
    """VideoMAE's names of the three projections."""

    def __init__(self, kind: Kind, attn: Any, out: Any, x: Tensor, batch: TokenBatch) -> None:
        super().__init__(kind, attn, x, batch)
        self._out = out

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self.attn
        parts = (attn.query, attn.key, attn.value)[first:last]
        return tuple(part(x).unflatten(1, (-1, attn.attention_head_size)) for part in parts)

    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        added: Tensor = self._out(summed, summed)
        return added


class VideoMAEBlock(OwnBlock):
    """transformers' ``VideoMAELayer``."""

    @property
    def cost(self) -> BlockCost:
        attn = self.attn
        query, key, value = (part.weight.numel() for part in (attn.query, attn.key, attn.value))
        mlp = sum(layer.weight.numel() for layer in self.mlp.modules() if isinstance(layer, nn.Linear))
        return BlockCost(query, key + value, attn.all_head_size, self.attn_out.dense.weight.numel(), mlp)

    @property
    def mlp(self) -> nn.Module:
        module: Any = self.module
        return nn.Sequential(module.intermediate, module.output.dense, module.output.dropout)

    def attention(self, x: Tensor, batch: TokenBatch) -> HFCore:
        return VideoMAECore(self.kind, self.attn, self.attn_out, x, batch)


class HFClips(HFViT):
    """A model of clips, as a whole or its tower alone."""

    inputs: ClassVar[Input] = "clips"
    table: ClassVar[Mapping[str, Made]] = CLIP_MODELS
    takes: ClassVar[frozenset[str]] = HFViT.takes - {"interpolate_pos_encoding"}
    read_as: ClassVar[str] = "(B, F, C, H, W)"
    families: ClassVar[tuple[Family, ...]] = (
        Family("vivit", "ViViT: attention over all tubelets of a clip"),
        Family("videomae", "VideoMAE: attention over all tubelets of a clip"),
    )

    # --- whether it can be driven ---

    def check(self) -> None:
        if self.kind is not _VIDEOMAE:
            super().check()
            return
        name, tower = type(self.model).__name__, self.tower
        for where, module in {name: self.model, f"{name}'s tower": tower, f"{name}'s encoder": tower.encoder}.items():
            check_whole(module, where)
        check_implementation(tower, name)
        if getattr(self.model, "fc_norm", self) is None:
            raise UnsupportedModel(
                f"this {name} was made with use_mean_pooling=False, so that its head reads the first patch of a clip, "
                "which any method may drop; make it with use_mean_pooling=True"
            )
        for index, layer in enumerate(self.layers):
            check_own_layer(index, layer, self.kind)

    # --- facts ---

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels of a patch."""
        deep, down, across = part_of(self.tower, self.kind.patches).kernel_size
        return int(deep), int(down), int(across)

    _length: int | None = None  # frames of shortened clips

    @property
    def frames(self) -> int:
        return self.made_for if self._length is None else self._length

    @property
    def made_for(self) -> int:
        """Frames of a clip as the library takes it."""
        return int(self.tower.config.num_frames)

    @property
    def steps(self) -> int:
        return self.frames // self.tubelet[0]

    @property
    def still(self) -> Grid:
        """Rows and columns of patches of one step in time."""
        (height, width), (_, down, across) = self.image_size, self.tubelet
        return height // down, width // across

    @property
    def stages(self) -> tuple[Stage, ...]:
        kind, layers, (rows, columns) = self.kind, self.layers, self.still
        width = int(part_of(self.tower, kind.patches).out_channels)
        heads = int(getattr(self.block_of(0).attn, kind.heads))
        has_class_token = kind.prefix > 0
        return (Stage(0, len(layers) - 1, (self.steps * rows, columns), width, heads, kind.prefix, has_class_token),)

    @property
    def final_norm(self) -> nn.Module:
        norm = getattr(self.tower, self.kind.norm)
        return nn.Identity() if norm is None else norm

    # --- clips ---

    def grid_of(self, images: Tensor) -> Grid:
        steps, rows, columns = self.lattice_of(images)
        return steps * rows, columns

    def lattice_of(self, images: Tensor) -> tuple[int, int, int]:
        deep, down, across = self.tubelet
        frames, height, width = (int(images.shape[axis]) for axis in (-4, -2, -1))
        return frames // deep, height // down, width // across

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        self.check_clips(images, frames=int(images.shape[1]))
        if self.kind is _VIDEOMAE:
            raise ReducerError(
                f"clips cannot be resized for {type(self.model).__name__}, whose positions are waves over all patches "
                "of clips of one size; make them shorter (fewer_frames)"
            )
        return self.lattice_of(images)[1:], self.tubelet[1:]

    def whole_steps(self, images: Tensor) -> tuple[int, int]:
        self.check_clips(images, size=(int(images.shape[-2]), int(images.shape[-1])))
        return self.steps, 1

    def shortened(self, images: Tensor) -> Host:
        twin = copy.copy(self)
        twin._length = int(images.shape[1])
        return twin

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        tower, kind = self.tower, self.kind
        self.check_embedded(images, resized)
        images = images.to(part_of(tower, kind.patches).weight.dtype)
        if resized:
            x = self._embed_resized(images)
        else:
            x = tower.embeddings(images, None) if kind is _VIDEOMAE else tower.embeddings(images)
        return TokenBatch.from_images(x, prefix=kind.prefix, has_class_token=kind.prefix > 0, track=track)

    def _embed_resized(self, images: Tensor) -> Tensor:
        """Clips of fewer frames or smaller ones -> (B, P + N, D), as the library embeds its own.

        Steps that stay have the positions of their own time; of smaller frames positions are interpolated, bicubic,
        antialiased, step by step. The library does neither [D].
        """
        embeddings, prefix = self.tower.embeddings, self.kind.prefix
        x = part_of(self.tower, self.kind.patches)(images.transpose(1, 2)).flatten(2).transpose(1, 2)
        lead, table = embeddings.position_embeddings.to(x).split(
            [prefix, embeddings.position_embeddings.shape[1] - prefix], dim=1
        )
        made_for = self.made_for // self.tubelet[0]
        steps, *grid = self.lattice_of(images)
        table = table.reshape(made_for, *self.still, -1)[spread_steps(made_for, steps)]
        if tuple(grid) != self.still:
            wide = table.permute(0, 3, 1, 2).to(torch.promote_types(x.dtype, torch.float32))
            wide = F.interpolate(wide, size=grid, mode="bicubic", antialias=True)
            table = wide.permute(0, 2, 3, 1).to(x.dtype)
        x = x + table.flatten(0, 2)
        if not prefix:
            return x
        x = torch.cat([(embeddings.cls_token + lead).expand(len(x), -1, -1), x], dim=1)
        found: Tensor = embeddings.dropout(x)
        return found

    def check_embedded(self, images: Tensor, resized: bool) -> None:
        """As ``check_clips``, of frames of any size where a reducer resized them."""
        self.check_clips(images, size=(int(images.shape[-2]), int(images.shape[-1])) if resized else None)

    def check_clips(self, images: Tensor, *, frames: int | None = None, size: Grid | None = None) -> None:
        """Refuse what the library would refuse, or take without telling and read otherwise. ``frames`` and ``size``:
        what they may have, where that is not the model's.
        """
        made_for, (height, width) = type(self.model).__name__, self.image_size if size is None else size
        if images.dim() != 5 or images.shape[2] != self.channels:
            raise ReducerError(
                f"{made_for} reads clips (B, F, {self.channels}, H, W); got {tuple(images.shape)}: prepare them as its "
                "processor does"
            )
        wanted = self.frames if frames is None else frames
        found, *pixels = (int(images.shape[axis]) for axis in (1, 3, 4))
        if (found, *pixels) != (wanted, height, width):
            raise ReducerError(
                f"the clips have {found} frames of {pixels[0]} x {pixels[1]} px and this {made_for} was made for "
                f"{wanted} of {height} x {width}; sample and resize them so"
            )

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        convolution = part_of(self.tower, self.kind.patches)
        return linear_macs(convolution, images[:1].to(convolution.weight.dtype).transpose(1, 2))

    # --- blocks ---

    def block_of(self, index: int) -> HFBlock:
        """A view of a layer."""
        return (VideoMAEBlock if self.kind is _VIDEOMAE else HFBlock)(self.kind, self.layers[index])

    def block(self, index: int) -> HostBlock:
        return self.block_of(index)

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        layout = batch.layout
        if not layout.rows:  # the library cannot tell heads where no token is left
            return None
        assert layout.uniform is not None
        x = batch.x.view(layout.images, layout.uniform[0], batch.x.shape[1])
        for layer in self.layers[first:last]:
            x = layer(x)
        return replace(batch, x=x.flatten(0, 1))

    # --- the head ---

    def pooled(self, batch: TokenBatch) -> Tensor:
        x = super().pooled(batch)
        norm = self.model._modules.get("fc_norm")
        return x if norm is None else norm(x)

    def _names(self) -> tuple[str, ...]:
        names = super()._names()
        return names if self.kind.module == "vivit" or "logits" in names else ("last_hidden_state",)

    def behind(self, block: int) -> Iterator[nn.Module]:
        yield from super().behind(block)
        if (norm := self.model._modules.get("fc_norm")) is not None:
            yield norm


HOST = HFClips


def check_own_layer(index: int, layer: nn.Module, kind: Kind) -> None:
    """As ``hf_vit.check_layer``, for layers that hold attention and MLP in two parts each."""
    where, stem = f"layer {index}", kind.layer.removesuffix("Layer")
    check_part(layer, kind.path(kind.layer), where)
    attention = layer._modules["attention"]
    check_part(attention, kind.path(kind.attention[1]), f"{where}'s attention")
    assert attention is not None
    for name, part in (("attention", "SelfAttention"), ("output", "SelfOutput")):
        check_part(attention._modules[name], kind.path(stem + part), f"{where}'s attention.{name}")
    for name, part in (("intermediate", "Intermediate"), ("output", "Output")):
        check_part(layer._modules[name], kind.path(stem + part), f"{where}'s {name}")


def check_part(module: nn.Module | None, path: str, where: str) -> None:
    """Refuse a part that is not the library's own, or that something rides on."""
    if module is None or qualified(module) != path:
        raise UnsupportedModel(
            f"{where} is a {type(module).__name__}, not transformers' {path.rpartition('.')[2]}, and steps of its own "
            "would be bypassed; put the plain one back, and wrap, shard or compile the reduced model instead"
        )
    check_whole(module, where)
