"""Models of transformers from a folder or the hub: config.json, safetensors, and what their processor does to images.

No code of a repository is run and nothing is unpickled: the class is one of those that ``reducers`` drives, by its name
in config.json. transformers is imported when such a model is opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ablations.models.hub import hub_file
from ablations.models.model_names import ModelName
from ablations.models.weight_files import ModelError, check_finite, load_into
from reducers.hosts import TYPES, host_of, kind_of

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_OF_VIDEOS = "video_preprocessor_config.json"  # as later versions call the processor's file of a model of clips
CLASSIFIER = "classifier"
_POSITIONS = ("pos_embed", "position_embeddings", "position_embedding.weight")
_MOMENTS = "time_embeddings"
_RESIZE_THEMSELVES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "cvt")  # of transformers.models
_SHARDS = "model.safetensors.index.json"
_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's, by number


def folder_of(name: ModelName, cache: Path | None, *, files: tuple[str, ...] = (CONFIG,)) -> Path:
    """The folder in which a model's files lie; those of the hub are fetched first."""
    folder = name.folder
    if folder is None:
        fetched = [hub_file(name.what, file, cache, str(name)) for file in files]
        return fetched[0].parent
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: name one that model.save_pretrained has written, or hf:OWNER/NAME")
    return folder


def config_of(name: ModelName, cache: Path | None = None) -> dict[str, Any]:
    """What config.json says.

    Raises:
        ModelError: it is missing, no JSON, asks for code of its own, or names a class that is not driven.
    """
    config = _read_json(folder_of(name, cache) / CONFIG, "save the model with model.save_pretrained(FOLDER)")
    if "auto_map" in config:
        raise ModelError(
            f"{name} brings code of its own (auto_map in {CONFIG}), and no code of a repository is run: take a model "
            "whose class transformers has, or convert it to one"
        )
    _class_path(name, config)
    return config


def classes_of(name: ModelName, config: dict[str, Any]) -> int | None:
    """Classes of the model's head; None where the class has no classifier."""
    if not any(what in _class_path(name, config) for what in ("ImageClassification", "VideoClassification")):
        return None
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels", 2))


def class_names(config: dict[str, Any]) -> tuple[str, ...]:
    """What the classes of the head are called, in order; () where the config has no names of its own for them."""
    found = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    names = tuple(found.get(number, "") for number in range(len(found)))
    generic = all(label == f"LABEL_{number}" for number, label in enumerate(names))
    return () if generic or "" in names else names


def frames_of(name: ModelName, config: dict[str, Any]) -> int | None:
    """Frames of a clip, as asked for or the model's own; None for a model of images."""
    if kind_of(_class_path(name, config)).inputs != "clips":
        return None
    return name.frames or _own_frames(name, config)


def create(
    name: ModelName, config: dict[str, Any], *, classes: int | None = None, cache: Path | None = None
) -> nn.Module:
    """The architecture with random weights, for images of the size that the model is to read."""
    kind = _class(name, config)
    settings = kind.config_class.from_dict(config)
    if classes is not None:
        settings.num_labels = classes
    settings._attn_implementation = _attention(kind)
    _set_size(name, settings, size_of(name, config, cache))
    if name.frames is not None:
        settings.num_frames = name.frames
    model: nn.Module = kind(settings)
    return model


def load(name: ModelName, config: dict[str, Any], cache: Path | None) -> nn.Module:
    """The model with its weights; positions are resampled to the size it is to read."""
    folder = folder_of(name, cache, files=(CONFIG, WEIGHTS))
    if not (folder / WEIGHTS).is_file():
        what = "is in several files" if (folder / _SHARDS).is_file() else "is missing"
        raise ModelError(
            f"{WEIGHTS} of {name} {what}, and only one safetensors file is read: save it again with "
            "model.save_pretrained(FOLDER, max_shard_size='100GB')"
        )
    kind = _class(name, config)
    model = _loaded(kind, f"the weights of {name}", folder, local_files_only=True, use_safetensors=True)
    size = size_of(name, config, cache)
    if _resizes_itself(name, config):  # the library itself goes by the size of the image
        _set_size(name, model.config, size)
        return model
    if size == _own_size(config) and name.frames in (None, frames_of(replace(name, frames=None), config)):
        return model
    sized = create(name, config, cache=cache)
    sized.load_state_dict(resampled(model.state_dict(), sized))
    return sized


def load_file(name: ModelName, config: dict[str, Any], weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model with weights from a file, under the names of its modules or those of the library's own files."""
    head = weights.get(f"{CLASSIFIER}.weight", weights.get(f"cls_{CLASSIFIER}.weight"))
    classes = None if head is None else head.shape[0]
    model = create(name, config, classes=classes)
    if not set(weights) <= set(model.state_dict()):
        own = create(ModelName(name.source, name.what, _own_size(config), name.frames), config, classes=classes)
        weights = _loaded(type(own), source, None, config=own.config, state_dict=dict(weights)).state_dict()
    load_into(model, resampled(weights, model), name=str(name), source=source)
    return model


def _attention(kind: Any) -> str:
    """The implementation that is asked for: reduced models have their own."""
    return "sdpa" if kind._supports_sdpa else "eager"


def _loaded(kind: Any, source: str, folder: Path | None, **options: Any) -> Any:
    """As the library loads it, nothing missing and everything finite."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        model, found = kind.from_pretrained(
            folder, trust_remote_code=False, dtype=torch.float32, attn_implementation=_attention(kind),
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{source} cannot be read ({error}): save the model again, or give WEIGHTS=file.safetensors"
        ) from error
    finally:
        if shown:
            library.enable_progress_bar()
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])[:5]]
    wrong += [f"{entry} does not fit" for entry in [*found["mismatched_keys"]][:5]]
    if wrong:
        raise ModelError(
            f"{source} do not fill a {kind.__name__} ({'; '.join(wrong)}): save the whole model, head included, or "
            "give WEIGHTS=file.safetensors"
        )
    check_finite(model.state_dict(), source)
    return model


def resampled(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights with positions for the model's size of image, as timm resamples them (bicubic, antialiased), and its
    number of frames, as transformers' TimeSformer does (to the nearest).

    Positions of a grid that is not square are left as they are, to be refused where they do not fit.

    Raises:
        ModelError: one table has all positions of a clip, which is not resampled.
    """
    host, expected, found = host_of(model), model.state_dict(), dict(weights)
    for key, value in weights.items():
        target = expected.get(key)
        if target is not None and key.endswith(_MOMENTS) and target.shape != value.shape:
            found[key] = interpolate(value.mT, size=target.shape[1], mode="nearest").mT.contiguous()
            continue
        if target is not None and host.inputs == "clips" and host.units == 1 and key.endswith(_POSITIONS):
            if target.shape != value.shape:
                raise ModelError(
                    f"the weights have positions of {value.shape[-2]} places of a clip, and {target.shape[-2]} are "
                    "asked for: leave IMG_SIZE and FRAMES (--img-size, --frames) out"
                )
            continue
        if not key.endswith(_POSITIONS) or target is None or target.shape == value.shape:
            continue
        prefix = target.shape[-2] - host.patches
        side = round((value.shape[-2] - prefix) ** 0.5)
        if side < 1 or side * side != value.shape[-2] - prefix:
            continue
        flat = value[None] if value.dim() == 2 else value
        new = resample_abs_pos_embed(flat, list(host.grid), [side, side], num_prefix_tokens=prefix)
        found[key] = new[0] if value.dim() == 2 else new
    return found


def size_of(name: ModelName, config: dict[str, Any], cache: Path | None = None) -> tuple[int, int]:
    """Height and width that the model reads: as asked for, else as its processor gives, else the model's own."""
    if name.size is not None:
        return name.size
    if _resizes_itself(name, config):  # such models read any size, and the processor says which
        with suppress(ModelError):
            return _crop(_processor(name, cache, config), name)
    return _own_size(config)


def input_of(name: ModelName, config: dict[str, Any], cache: Path | None = None) -> dict[str, Any]:
    """What the processor does to images, in the words of ``timm.data.resolve_model_data_config``."""
    told = _processor(name, cache, config)
    height, width = _crop(told, name)
    crops = bool(told.get("do_center_crop", False))
    share = 1.0
    if crops and "shortest_edge" in (told.get("size") or {}):
        share = min(1.0, min(height, width) / int(told["size"]["shortest_edge"]))
    height, width = size_of(name, config, cache)
    mean, std = _normalisation(told)
    return {
        "input_size": (int(config.get("num_channels", _vision(config).get("num_channels", 3))), height, width),
        "mean": mean,
        "std": std,
        "crop_pct": share,
        "crop_mode": "center" if crops else "squash",  # a processor that does not crop stretches the image to its size
        "interpolation": _MODES.get(int(told.get("resample", 2)), "bilinear"),
    }


def _normalisation(told: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation as shares of white; ViViT's processor takes one off what it has rescaled, and others
    may rescale to another range than 0 … 1.
    """
    normalises = told.get("do_normalize", True)
    means = tuple(told["image_mean"]) if normalises else (0.0,) * 3
    stds = tuple(told["image_std"]) if normalises else (1.0,) * 3
    white = 255 * float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 255.0
    offset = 1.0 if told.get("offset", False) else 0.0
    if offset == 0 and abs(white - 1) < 1e-6:  # as nearly all: their numbers are left to the last bit
        return means, stds
    return tuple((mean + offset) / white for mean in means), tuple(std / white for std in stds)


def _own_frames(name: ModelName, config: dict[str, Any]) -> int:
    """As the config says, which need not say what is the class's default."""
    return int(config["num_frames"] if "num_frames" in config else _class(name, config).config_class().num_frames)


def _processor(name: ModelName, cache: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    if frames_of(name, config) is not None:
        with suppress(ModelError):
            return _read_json(folder_of(name, cache, files=(CONFIG, _OF_VIDEOS)) / _OF_VIDEOS, "")
    folder = folder_of(name, cache, files=(CONFIG, PROCESSOR))
    return _read_json(folder / PROCESSOR, "save the processor beside the model: processor.save_pretrained(FOLDER)")


def _crop(told: dict[str, Any], name: ModelName) -> tuple[int, int]:
    """Height and width that leave the processor."""
    size = told.get("crop_size") if told.get("do_center_crop") else told.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, dict) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise ModelError(f"{PROCESSOR} of {name} gives no size (size or crop_size); give one: --img-size 224")


def _vision(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about images."""
    part: dict[str, Any] = config.get("vision_config") or config
    return part


def _own_size(config: dict[str, Any]) -> tuple[int, int]:
    size = _vision(config).get("image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _set_size(name: ModelName, settings: Any, size: tuple[int, int]) -> None:
    part = getattr(settings, "vision_config", settings)
    square = size[0] == size[1]
    if not square and settings.model_type.startswith(("clip", "siglip")):
        raise ModelError(f"{name} reads square images alone: give one number, such as --img-size {size[0]}")
    if hasattr(part, "patch_size"):
        patch = part.patch_size
    elif hasattr(part, "tubelet_size"):
        patch = part.tubelet_size[-1]
    else:
        patch = math.prod(part.patch_stride)
    if any(side % (patch if isinstance(patch, int) else patch[0]) for side in size):
        raise ModelError(f"{size[0]} x {size[1]} px are no whole patches of {patch} of {name}: give a multiple of it")
    part.image_size = size[0] if square else size


def _class_path(name: ModelName, config: dict[str, Any]) -> str:
    known = {path.rpartition(".")[2]: path for path in TYPES if path.startswith("transformers.")}
    named = (config.get("architectures") or [""])[0]
    if named not in known:
        raise ModelError(
            f"{name} is a {named or 'model without a class in config.json'}, which is not driven; there are "
            f"{', '.join(known)}"
        )
    return known[named]


def _resizes_itself(name: ModelName, config: dict[str, Any]) -> bool:
    """The library fits positions to the size of each image."""
    return _class_path(name, config).split(".")[2] in _RESIZE_THEMSELVES


def _class(name: ModelName, config: dict[str, Any]) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{name} is a model of transformers, and the package {error.name} is missing; install the extra: "
            "pip install 'sievit[hf]'"
        ) from error
    return getattr(transformers, _class_path(name, config).rpartition(".")[2])


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.name} is not in {path.parent}: {remedy}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no settings: {remedy}")
    return data
