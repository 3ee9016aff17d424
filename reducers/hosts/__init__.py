"""Hosts: what the runtime knows of each library's models. A library is imported when a model of it comes.

This table is all that a new host needs beside its own file: exact type -> module, whose ``HOST`` is the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import NoReturn, get_args

from torch import nn

from reducers.errors import ReducerError, UnsupportedModel
from reducers.hosts.protocol import Host, Places

TYPES: dict[str, str] = {
    "timm.models.vision_transformer.VisionTransformer": "reducers.hosts.timm_vit",
    "timm.models.deit.VisionTransformerDistilled": "reducers.hosts.timm_vit",
    "timm.models.eva.Eva": "reducers.hosts.timm_eva",
    "timm.models.beit.Beit": "reducers.hosts.timm_beit",
    "timm.models.naflexvit.NaFlexVit": "reducers.hosts.timm_naflex",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": "reducers.hosts.timm_relpos",
    "timm.models.swin_transformer.SwinTransformer": "reducers.hosts.timm_swin",
    "reducers.backbones.ps_vit.PSViT": "reducers.hosts.ps_vit",
    "reducers.backbones.stvit_r.STViTRSwin": "reducers.hosts.stvit",
    "reducers.backbones.stvit_swin.STViTSwin": "reducers.hosts.stvit",
    "reducers.backbones.xvit.XViT": "reducers.hosts.xvit",
    "transformers.models.vit.modeling_vit.ViTModel": "reducers.hosts.hf_vit",
    "transformers.models.vit.modeling_vit.ViTForImageClassification": "reducers.hosts.hf_vit",
    "transformers.models.deit.modeling_deit.DeiTModel": "reducers.hosts.hf_vit",
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": "reducers.hosts.hf_vit",
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": "reducers.hosts.hf_vit",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": "reducers.hosts.hf_vit",
    "transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification": "reducers.hosts.hf_vit",
    **dict.fromkeys(
        (
            f"transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters{name}"
            for name in ("Model", "ForImageClassification")
        ),
        "reducers.hosts.hf_vit",
    ),
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel": "reducers.hosts.hf_vit",
    "transformers.models.clip.modeling_clip.CLIPVisionModel": "reducers.hosts.hf_vit",
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection": "reducers.hosts.hf_vit",
    "transformers.models.clip.modeling_clip.CLIPForImageClassification": "reducers.hosts.hf_vit",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": "reducers.hosts.hf_vit",
    "transformers.models.siglip.modeling_siglip.SiglipForImageClassification": "reducers.hosts.hf_vit",
    "transformers.models.cvt.modeling_cvt.CvtModel": "reducers.hosts.hf_cvt",
    "transformers.models.cvt.modeling_cvt.CvtForImageClassification": "reducers.hosts.hf_cvt",
    "reducers.backbones.cvt.CvT": "reducers.hosts.cvt",
    "transformers.models.vivit.modeling_vivit.VivitModel": "reducers.hosts.hf_clips",
    "transformers.models.vivit.modeling_vivit.VivitForVideoClassification": "reducers.hosts.hf_clips",
    "transformers.models.videomae.modeling_videomae.VideoMAEModel": "reducers.hosts.hf_clips",
    "transformers.models.videomae.modeling_videomae.VideoMAEForVideoClassification": "reducers.hosts.hf_clips",
    "transformers.models.timesformer.modeling_timesformer.TimesformerModel": "reducers.hosts.hf_timesformer",
    "transformers.models.timesformer.modeling_timesformer.TimesformerForVideoClassification": (
        "reducers.hosts.hf_timesformer"
    ),
}

_TOWERS = ("clip.modeling_clip.CLIPModel", "siglip.modeling_siglip.SiglipModel")  # what reads images is a part of them

SUPPORTED = (
    "Supported: timm's VisionTransformer and VisionTransformerDistilled (ViT, DeiT, DeiT-III, AugReg, CLIP, SigLIP, "
    "DINOv2, hybrids, ViTamin, …), Eva (EVA-02, DINOv3, PE, RoPE-ViT, …), Beit, VisionTransformerRelPos, NaFlexVit and "
    "SwinTransformer whose blocks and attentions are those of docs/families.md; transformers' ViT, DeiT, DINOv2, "
    "DINOv3 ViT, CvT, CLIP and SigLIP vision models, TimeSformer, ViViT and VideoMAE; and the networks of "
    "reducers.backbones"
)


def host_of(model: nn.Module, *, places: Places = "heaviest", options: Mapping[str, str] | None = None) -> Host:
    """The host of a model, which is chosen by its exact type. ``places``, and ``options`` as its ``host``: as in
    ``reduce_tokens``.

    Raises:
        UnsupportedModel: no host knows the type, or the model could not be run exactly.
        ReducerError: the model has no use for such places, or no such options.
    """
    module = TYPES.get(_name(type(model)))
    if module is None:
        refuse_type(model)
    kind: type[Host] = import_module(module).HOST
    check_options(kind, type(model).__name__, options)
    host = kind(model, places=places, options=options)
    host.check()
    if places not in get_args(Places):
        raise ReducerError(f"places={places!r} is unknown; use one of {', '.join(map(repr, get_args(Places)))}")
    if places == "mean" and (why := host.mean_places) is not None:
        raise ReducerError(f"places='mean' is not for this {type(model).__name__}: {why}; leave places out")
    return host


def check_options(kind: type[Host], name: str, options: Mapping[str, str] | None) -> None:
    """Refuse what a host, of the model ``name``, cannot be asked for.

    Raises:
        ReducerError: an option or a value that it does not know.
    """
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise ReducerError(f"options of a model are written {{name: value}}; got {options!r}")
    known = kind.options
    for option, value in options.items():
        if option not in known:
            told = f"it knows {', '.join(map(repr, known))}" if known else "it knows none"
            raise ReducerError(f"{name} has no option {option!r}: {told}")
        if value not in known[option]:
            told = ", ".join(map(repr, known[option]))
            raise ReducerError(f"the option {option!r} of {name} is one of {told}; got {value!r}")


def kind_of(path: str) -> type[Host]:
    """The host of the models of a type in ``TYPES``."""
    kind: type[Host] = import_module(TYPES[path]).HOST
    return kind


def hosts() -> list[type[Host]]:
    """Every host, each once; their libraries are imported."""
    return [import_module(module).HOST for module in dict.fromkeys(TYPES.values())]


def refuse_type(model: nn.Module) -> NoReturn:
    """Say why a type is not driven, and what to do instead."""
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
    if _name(type(model)).removeprefix("transformers.models.") in _TOWERS:
        raise UnsupportedModel(
            f"{name} reads text beside images; reduce the tower that reads images: reduce_tokens(model.vision_model, …)"
        )
    if name.startswith(("Parametrized", "FSDP")) and any(_name(kind) in TYPES for kind in type(model).__mro__):
        raise UnsupportedModel(
            f"the model has become a {name}, whose own steps would be bypassed; remove the parametrization, or shard "
            f"the reduced model in place of the plain one. {SUPPORTED}."
        )
    raise UnsupportedModel(f"{name} is not supported. {SUPPORTED}.")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
