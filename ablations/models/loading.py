"""Models by name and their weights: shipped, from a hub, a folder or a safetensors file, or random and labelled so."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path
from torch import nn

from ablations.models import digits, hf, paper, siblings
from ablations.models.clips import CLIP_CLASSIFIER, CLIPS, FRAMES
from ablations.models.hub import hub_file
from ablations.models.model_names import TIMM_FOLDER, TIMM_HUB, TRANSFORMERS, ModelName, parse_model_name
from ablations.models.weight_files import ModelError, check_finite, load_into, read_shapes, read_weights
from ablations.records.files import absolute, user_path
from reducers.digest import state_digest

log = logging.getLogger(__name__)

RANDOM = "random"
DEFAULT_MODEL = "deit_tiny_patch16_224"  # of every other workload
_HUB_FILE, _CONFIG = "model.safetensors", "config.json"
_CONFIG_FIELDS = frozenset(field.name for field in fields(PretrainedCfg))

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
    return digits.SHIPPED.get(workload, (DEFAULT_MODEL,))


def located_weights(weights: str | None) -> str | None:
    """A file of weights by its full path, for whoever runs elsewhere; None and "random" as they are."""
    return weights if weights == RANDOM else absolute(weights)


@dataclass(frozen=True)
class _Described:
    """What timm, a folder or a hub says of a model of timm's."""

    name: ModelName
    architecture: str  # timm's name, the tag of weights included
    config: PretrainedCfg
    arguments: dict[str, Any]  # it is made with

    @property
    def folder(self) -> Path | None:
        return self.name.folder


def check_model(name: str) -> None:
    """Refuse a name that no library knows, with the nearest ones that exist."""
    known = parse_model_name(name)
    if known.source == TRANSFORMERS:
        config = hf.config_of(known)
        if known.frames is not None and hf.frames_of(known, config) is None:
            raise ModelError(f"{known.what} reads images, and no clips: leave FRAMES={known.frames} (--frames) out")
        return
    if known.frames is not None:
        raise ModelError(
            f"{known.what} has one number of frames, or reads images: leave FRAMES={known.frames} (--frames) out"
        )
    if known.what in digits.KNOWN:
        if known.size is not None:
            side = digits.digits_input(known.what)["input_size"][-1]
            raise ModelError(f"{known.what} reads scenes of {side} px and no others: leave IMG_SIZE out")
    elif not _is_paper(known):
        _described(known)


def _is_paper(name: ModelName) -> bool:
    return not name.source and name.what in paper.PAPER


def _described(name: ModelName, cache: Path | None = None) -> _Described:
    """timm's description of a model and its weights; refuses a name or tag that does not exist."""
    if name.source:
        return _elsewhere(name, cache)
    if not timm.is_model(name.what):
        every = [*digits.KNOWN, *paper.PAPER, *timm.list_models()]
        near = difflib.get_close_matches(name.what.split(".")[0], every, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the names"
        raise ModelError(f"unknown model {name.what!r}: {hint}")
    architecture = name.what.split(".")[0]
    try:
        config = timm.get_pretrained_cfg(name.what, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
        raise ModelError(f"timm knows no weights {name.what!r}: choose among {tags}") from error
    assert config is not None, "timm raises for what is not registered"
    return _Described(name, name.what, config, {})


def _elsewhere(name: ModelName, cache: Path | None) -> _Described:
    """A model that timm has saved, in a folder or on the hub."""
    folder = name.folder or hub_file(name.what, _CONFIG, cache, str(name)).parent
    try:
        config, architecture, arguments = load_model_config_from_path(folder)
        described = PretrainedCfg(**{key: value for key, value in config.items() if key in _CONFIG_FIELDS})
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{name} has no {_CONFIG} of timm's ({type(error).__name__}: {error}): save the model with "
            f"timm.models.save_for_hf; a model of transformers is written {TRANSFORMERS}:{name.what}"
        ) from error
    if not timm.is_model(architecture):
        raise ModelError(f"{name} is a {architecture!r}, which this version of timm does not know: update timm")
    return _Described(name, architecture, described, dict(arguments or {}))


def input_config(name: str) -> dict[str, Any]:
    """What the model reads, as ``timm.data.resolve_model_data_config`` has it: size, mean, std, crop, interpolation."""
    check_model(name)
    known = parse_model_name(name)
    if known.source == TRANSFORMERS:
        return hf.input_of(known, hf.config_of(known))
    if known.what in digits.KNOWN:
        return digits.digits_input(known.what)
    if _is_paper(known):
        return paper.input_of(known.what, known.size)
    found = dict(resolve_data_config(pretrained_cfg=_described(known).config.to_dict()))
    return found if known.size is None else {**found, "input_size": (found["input_size"][0], *known.size)}


def clip_frames(name: str) -> int | None:
    """How many frames a clip has that the model reads; None for a model of images."""
    check_model(name)
    known = parse_model_name(name)
    if known.source == TRANSFORMERS:
        return hf.frames_of(known, hf.config_of(known))
    if known.what in CLIPS:
        return FRAMES
    return paper.FRAMES.get(known.what) if _is_paper(known) else None


def class_names(name: str) -> tuple[str, ...]:
    """What the model calls the classes of its head, in order; () where it does not say."""
    known = parse_model_name(name)
    return hf.class_names(hf.config_of(known)) if known.source == TRANSFORMERS else ()


def head_classes(name: str, *, weights: str | None, headless: bool = False) -> int | None:
    """How many classes the model's head tells apart; None for random weights, whose head follows the data.

    A weights file decides by the shape of its head: a model finetuned on ten classes has ten. ``headless``: a model
    without a classifier will do, and has 0; also one whose file of weights leaves it out.
    """
    check_model(name)
    known = parse_model_name(name)
    own = known.what in digits.KNOWN
    if weights == RANDOM and not own:
        return None
    if weights not in (None, RANDOM) and (headless or not own):
        rows = _file_head(known, user_path(str(weights)))
        if rows is not None or (headless and known.source != TRANSFORMERS):
            return rows or 0
    if own:
        return digits.classes_of(known.what)
    if _is_paper(known):
        return paper.classes_of(known.what)
    if known.source == TRANSFORMERS:
        classes = hf.classes_of(known, hf.config_of(known))
    else:
        classes = _described(known).config.num_classes
    if not classes and not headless:
        raise ModelError(
            f"{name} comes without a classifier, so nothing can be scored: choose a model trained to classify, "
            "or give WEIGHTS=file.safetensors with a head, or ask for its features alone with TASK=embed (--task embed)"
        )
    return int(classes or 0)


def open_model(
    name: str,
    *,
    weights: str | None,
    workload_name: str,
    classes: int | None = None,
    seed: int = 0,
    hub_cache: Path | None = None,
    headless: bool = False,
) -> LoadedModel:
    """A model in evaluation mode on the CPU, float32.

    ``weights``: None for the shipped ones (digits_*) or those that come with the name (``model_names``), "random"
    (seeded by ``seed``), or the path of a safetensors file. ``classes`` is the head the workload's labels refer to:
    another one is refused, and a random head is made to fit. ``hub_cache`` is the hub's download folder where it is not
    the usual one. ``headless``: what its classifier says is not asked, and it may have none, or one of other classes.
    """
    check_model(name)
    if workload_name in digits.SHIPPED:
        _check_reads(workload_name, name, weights)
    head = head_classes(name, weights=weights, headless=headless)
    if head is not None and classes is not None and head != classes and not headless:
        raise ModelError(
            f"the head of {name} has {head} classes, the labels of {workload_name} have {classes}: "
            "choose a model, or WEIGHTS, trained on these classes"
        )
    kind: WeightsKind
    if weights == RANDOM:
        model, kind = _random(name, classes=head or classes or None, seed=seed), "random"
    elif weights is not None:
        model, kind = _from_file(name, user_path(weights), classes=head), "file"
    elif name in digits.KNOWN:
        model, kind = _from_file(name, _shipped(name), classes=head), "embedded"
    elif _is_paper(parse_model_name(name)):
        raise ModelError(
            f"{name} comes without weights, as its authors' are not in a form that is read without running code: give "
            "WEIGHTS=file.safetensors (docs/backbones.md), or WEIGHTS=random"
        )
    else:
        known = parse_model_name(name)
        loads = _from_transformers if known.source == TRANSFORMERS else _from_timm
        model, kind = loads(known, hub_cache), "hub" if known.folder is None else "file"
    model = model.float().eval()
    params_m = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return LoadedModel(model, state_digest(model), kind, params_m)


def _check_reads(workload: str, name: str, weights: str | None) -> None:
    """Refuse a model that has another input than the embedded scenes, or shipped weights that read the other set."""
    if name not in digits.readers(workload):
        raise ModelError(embedded_needs(name, workload))
    home = digits.READS.get(name, workload)
    if weights is None and home != workload:
        raise ModelError(
            f"the shipped weights of {name} read the scenes of WORKLOAD={home}, not those of {workload}: use "
            f"WORKLOAD={home}, or MODEL={' or MODEL='.join(digits.SHIPPED[workload])}, or give WEIGHTS"
        )


def embedded_needs(name: str, workload: str) -> str:
    """Why another model cannot run on an embedded workload, and what to do."""
    home = digits.READS.get(name)
    other = f"WORKLOAD={home}" if home else f"give {name} images with WORKLOAD=imagefolder DATA=FOLDER"
    return (
        f"the {workload} workload is {digits.what_is_shown(workload)}, which {name} cannot read: use MODEL="
        f"{' or MODEL='.join(digits.SHIPPED[workload])}, or {other}"
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
    """The architecture with random weights; ``classes`` None: as many as it has by itself, 0: without a classifier."""
    known = parse_model_name(name)
    if known.source == TRANSFORMERS:
        return hf.create(known, hf.config_of(known), classes=classes)
    if known.what in digits.KNOWN:
        model = digits.create_known(known.what)
        if classes == 0:
            siblings.without_classifier(model)
        return model
    if _is_paper(known):
        return paper.create(known.what, size=known.size, classes=classes)
    described = _described(known)
    if known.source and classes is None:
        classes = described.config.num_classes
    return timm.create_model(
        described.architecture, pretrained=False, **{**described.arguments, "num_classes": classes, **_sized(known)}
    )


def _sized(name: ModelName) -> dict[str, Any]:
    return {} if name.size is None else {"img_size": name.size}


def _seeded(seed: int, create: Callable[[], nn.Module]) -> nn.Module:
    """Build with a seed of its own, leaving the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create()


def _random(name: str, *, classes: int | None, seed: int) -> nn.Module:
    return _seeded(seed, lambda: create_model(name, classes=classes))


def _from_file(name: str, path: Path, *, classes: int | None) -> nn.Module:
    known, weights = parse_model_name(name), read_weights(path)
    if known.source == TRANSFORMERS:
        config = hf.config_of(known)
        return _seeded(0, lambda: hf.load_file(known, config, weights, str(path)))
    model = _seeded(0, lambda: create_model(name, classes=classes))
    if _is_paper(known):
        weights = dict(paper.adopted(model, weights))
    elif known.size is not None:
        weights = hf.resampled(weights, model)
    load_into(model, weights, name=name, source=str(path))
    return model


def _from_transformers(name: ModelName, cache: Path | None) -> nn.Module:
    config = hf.config_of(name, cache)
    return _seeded(0, lambda: hf.load(name, config, cache))


def _from_timm(name: ModelName, cache: Path | None) -> nn.Module:
    """timm's own loading, but of a safetensors file only, where timm would fall back to pickled checkpoints."""
    described = _described(name, cache)
    config = described.config
    if name.source == TIMM_FOLDER:
        path = user_path(name.what) / _HUB_FILE
    elif name.source == TIMM_HUB:
        path = hub_file(name.what, _HUB_FILE, cache, str(name))
    elif not config.hf_hub_id:
        raise ModelError(f"timm has no weights for {name}: give WEIGHTS=file.safetensors, or WEIGHTS=random")
    else:
        path = hub_file(config.hf_hub_id, config.hf_hub_filename or _HUB_FILE, cache, str(name))
    overlay = {"state_dict": read_weights(path), "custom_load": False}
    settings: dict[str, Any] = {**described.arguments, **_sized(name)}
    if name.source:  # as timm saved it, not as the architecture is registered
        settings = {"num_classes": config.num_classes, **settings, "pretrained_cfg": config.to_dict()}
    model: nn.Module = _seeded(
        0,
        lambda: timm.create_model(described.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **settings),
    )
    check_finite(model.state_dict(), f"the hub's weights for {name}" if name.folder is None else f"{path}")
    return model


def _file_head(name: ModelName, path: Path) -> int | None:
    """Rows of the classifier in a weights file, or None where it has none under the model's name for it."""
    if name.what in digits.KNOWN:
        classifier: Any = {**siblings.CLASSIFIER, **CLIP_CLASSIFIER}.get(name.what, "head")
    elif _is_paper(name):
        classifier = paper.CLASSIFIER.get(name.what, "head")
    else:
        classifier = hf.CLASSIFIER if name.source == TRANSFORMERS else _described(name).config.classifier
    first = classifier[0] if isinstance(classifier, (tuple, list)) else classifier
    shape = read_shapes(path).get(f"{first}.weight")
    return shape[0] if shape else None
