"""Models by name and their weights: shipped, from timm's hub, from a safetensors file, or random and labelled so."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn

from ablations.models import digits
from ablations.models.weight_files import ModelError, load_into, read_shapes, read_weights, state_digest
from ablations.records.files import absolute, user_path

log = logging.getLogger(__name__)

RANDOM = "random"
DEFAULT_MODELS = {"embedded": ("digits_vit_small", "digits_vit_tiny")}
DEFAULT_MODEL = "deit_tiny_patch16_224"  # of every other workload
_HUB_FILE = "model.safetensors"

WeightsKind = Literal["embedded", "hub", "file", "random"]


@dataclass(frozen=True)
class LoadedModel:
    """A plain model in evaluation mode, and where its weights come from."""

    model: nn.Module
    digest: str  # sha256 of the weights
    weights: WeightsKind
    params_m: float  # millions of parameters


def default_models(workload: str) -> tuple[str, ...]:
    """The models a workload is measured with where none is named, the main one first."""
    return DEFAULT_MODELS.get(workload, (DEFAULT_MODEL,))


def located_weights(weights: str | None) -> str | None:
    """A file of weights by its full path, for whoever runs elsewhere; None and "random" as they are."""
    return weights if weights == RANDOM else absolute(weights)


def check_model(name: str) -> None:
    """Refuse a name that neither timm nor the embedded workload knows, with the nearest ones that exist."""
    if name in digits.KNOWN:
        return
    if not timm.is_model(name):
        known = [*digits.KNOWN, *timm.list_models()]
        near = difflib.get_close_matches(name.split(".")[0], known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the names"
        raise ModelError(f"unknown model {name!r}: {hint}")
    _config(name)


def _config(name: str) -> PretrainedCfg:
    """timm's description of a model and its weights; refuses a tag that does not exist."""
    architecture = name.split(".")[0]
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
        raise ModelError(f"timm knows no weights {name!r}: choose among {tags}") from error
    assert config is not None, "timm raises for what is not registered"
    return config


def input_config(name: str) -> dict[str, Any]:
    """What the model reads, as ``timm.data.resolve_model_data_config`` has it: size, mean, std, crop, interpolation."""
    check_model(name)
    if name in digits.KNOWN:
        return digits.digits_input()
    return dict(resolve_data_config(pretrained_cfg=_config(name).to_dict()))


def head_classes(name: str, *, weights: str | None) -> int | None:
    """How many classes the model's head tells apart; None for random weights, whose head follows the data.

    A weights file decides by the shape of its head: a model finetuned on ten classes has ten.
    """
    check_model(name)
    if name in digits.KNOWN:
        return digits.create_digits_model(name).num_classes
    if weights == RANDOM:
        return None
    if weights is not None:
        rows = _file_head(name, user_path(weights))
        if rows is not None:
            return rows
    config = _config(name)
    if not config.num_classes:
        raise ModelError(
            f"{name} comes without a classifier, so nothing can be scored: choose a model trained to classify, "
            "or give WEIGHTS=file.safetensors with a head"
        )
    return int(config.num_classes)


def open_model(
    name: str,
    *,
    weights: str | None,
    workload_name: str,
    classes: int | None = None,
    seed: int = 0,
    hub_cache: Path | None = None,
) -> LoadedModel:
    """A model in evaluation mode on the CPU, float32.

    ``weights``: None for the shipped ones (digits_*) or timm's from the hub, "random" (seeded by ``seed``), or the path
    of a safetensors file. ``classes`` is the head the workload's labels refer to: another one is refused, and a
    random head is made to fit. ``hub_cache`` is the hub's download folder where it is not the usual one.
    """
    check_model(name)
    if workload_name == "embedded" and name not in digits.KNOWN:
        raise ModelError(embedded_needs(name))
    head = head_classes(name, weights=weights)
    if head is not None and classes is not None and head != classes:
        raise ModelError(
            f"the head of {name} has {head} classes, the labels of {workload_name} have {classes}: "
            "choose a model, or WEIGHTS, trained on these classes"
        )
    kind: WeightsKind
    if weights == RANDOM:
        model, kind = _random(name, classes=head or classes, seed=seed), "random"
    elif weights is not None:
        model, kind = _from_file(name, user_path(weights), classes=head), "file"
    elif name in digits.KNOWN:
        model, kind = _from_file(name, _shipped(name), classes=head), "embedded"
    else:
        model, kind = _from_hub(name, hub_cache), "hub"
    model = model.float().eval()
    params_m = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return LoadedModel(model, state_digest(model), kind, params_m)


def embedded_needs(name: str) -> str:
    """Why another model cannot run on the embedded workload, and what to do."""
    return (
        f"the embedded workload is 64 x 64 grey digits, which {name} cannot read: use MODEL="
        f"{' or MODEL='.join(digits.MODELS)}, or give {name} images with WORKLOAD=imagefolder DATA=FOLDER"
    )


def _shipped(name: str) -> Path:
    if name in digits.FROM_SCRATCH:
        raise ModelError(
            f"{name} comes without weights, for it is trained from scratch: give WEIGHTS=random to a run that trains "
            "(specs/hvt.yaml), or WEIGHTS=file.safetensors"
        )
    path: Path = digits.WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise ModelError(
            f"the weights of {name} that belong to the package are missing ({path}): install it again, "
            "train them with `make weights`, or give WEIGHTS=random"
        )
    return path


def create_model(name: str, *, classes: int | None = None) -> nn.Module:
    """The architecture with random weights; ``classes`` None: as many as it has by itself."""
    if name in digits.KNOWN:
        return digits.create_digits_model(name)
    return timm.create_model(name, pretrained=False, num_classes=classes)


def _seeded(seed: int, create: Callable[[], nn.Module]) -> nn.Module:
    """Build with a seed of its own, leaving the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create()


def _random(name: str, *, classes: int | None, seed: int) -> nn.Module:
    return _seeded(seed, lambda: create_model(name, classes=classes))


def _from_file(name: str, path: Path, *, classes: int | None) -> nn.Module:
    model = _seeded(0, lambda: create_model(name, classes=classes))
    load_into(model, read_weights(path), name=name, source=str(path))
    return model


def _from_hub(name: str, cache: Path | None) -> nn.Module:
    """timm's own loading, but of a safetensors file only, where timm would fall back to pickled checkpoints."""
    config = _config(name)
    if not config.hf_hub_id:
        raise ModelError(f"timm has no weights for {name}: give WEIGHTS=file.safetensors, or WEIGHTS=random")
    path = _hub_file(config.hf_hub_id, config.hf_hub_filename or _HUB_FILE, cache, name)
    overlay = {"state_dict": read_weights(path), "custom_load": False}
    model: nn.Module = _seeded(0, lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay))
    for key, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{key} of the hub's weights for {name} is not finite: give WEIGHTS=file.safetensors")
    return model


def _hub_file(hub_id: str, filename: str, cache: Path | None, name: str) -> Path:
    if not filename.endswith(".safetensors"):
        raise ModelError(
            f"the hub keeps the weights of {name} as {filename}, and only safetensors files are read: "
            "convert them and give WEIGHTS=file.safetensors"
        )
    repository, _, revision = hub_id.partition("@")
    problem: Exception | None = None
    for local in (True, False):  # what is already here first: no request, and the same answer offline
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, filename, revision=revision or None, cache_dir=cache, local_files_only=local
                )
            )
        except Exception as error:  # noqa: BLE001  anything a network can do; the reason is passed on
            problem = error
    raise ModelError(
        f"the weights of {name} cannot be fetched from the hub ({repository}: {type(problem).__name__}): "
        "connect to the network, or give WEIGHTS=file.safetensors, or WEIGHTS=random"
    ) from problem


def _file_head(name: str, path: Path) -> int | None:
    """Rows of the classifier in a weights file, or None where it has none under the model's name for it."""
    classifier = _config(name).classifier
    first = classifier[0] if isinstance(classifier, (tuple, list)) else classifier
    shape = read_shapes(path).get(f"{first}.weight")
    return shape[0] if shape else None
