"""Workloads: the images an ablation is measured on, and the models with their weights.

``open_images`` and ``open_model`` are the two doors, and ``measure.opening`` goes through both; all that is behind them
ends in a ``Workload`` and a ``LoadedModel``.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ablations.models.digits import EMBEDDED, EMBEDDED_V1, MOVING, VIDEOS, readers
from ablations.models.loading import (
    LoadedModel,
    check_model,
    class_names,
    clip_frames,
    default_models,
    embedded_needs,
    head_classes,
    input_config,
    open_model,
)
from ablations.models.weight_files import ModelError
from ablations.workloads import base, embedded
from ablations.workloads.base import Workload, WorkloadError, check_limit
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.named import FAMILIES, open_named
from ablations.workloads.preprocess import Preprocess, Resize
from ablations.workloads.reading import AS_USUAL, ImageSource, Reading
from ablations.workloads.videos import folder, reader
from ablations.workloads.videos.prepare import ClipPreprocess
from ablations.workloads.videos.sampling import ONE_VIEW, Sampling, parse_sampling

__all__ = [
    "ImageSource",
    "LoadedModel",
    "ModelError",
    "Reading",
    "Sampling",
    "Workload",
    "WorkloadError",
    "available_workloads",
    "default_models",
    "open_images",
    "open_model",
    "open_workload",
    "parse_sampling",
    "split_calibration",
]


def available_workloads() -> dict[str, str]:
    """Every kind of workload name, with one line that says what it is."""
    return {
        EMBEDDED: "digit pairs (which digit is shown twice?), made by the suite; nothing to download",
        EMBEDDED_V1: "the scenes that embedded was before: cluttered digits",
        MOVING: "clips of moving digits (where does the digit move?), made by the suite; nothing to download",
        "imagefolder": "DATA=FOLDER with one folder a class, as ImageNet has (any subset) or any other, or LABELS=FILE",
        VIDEOS: "DATA=FOLDER with one folder a class, in it videos (as Kinetics has them) or folders of frames",
        "timm:SPEC": "a data set of timm.data.create_dataset, kept in DATA",
        "torchvision:NAME": "a class of torchvision.datasets, kept in DATA; NAME@SPLIT chooses the split",
        "hub:NAME": "a Hugging Face data set, with the package `datasets`; NAME@SPLIT chooses the split",
    }


def open_workload(
    name: str,
    *,
    data: str | None,
    model: str,
    limit: int | None,
    strict: bool,
    cache: Path | None,
    weights: str | None = None,
    resize: Resize = "auto",
    download: bool = False,
    reading: Reading | None = None,
    sampling: Sampling = ONE_VIEW,
) -> Workload:
    """``open_images`` with its source spelled out: ``name``, ``data``, ``limit``, ``strict``, ``resize``, ``download``,
    ``reading`` and ``sampling`` are those of ``ImageSource``.
    """
    source = ImageSource(
        name, data, limit=limit, strict=strict, download=download, resize=resize, reading=reading or AS_USUAL,
        sampling=sampling,
    )  # fmt: skip
    return open_images(source, model, weights=weights, cache=cache)


def open_images(
    source: ImageSource,
    model: str,
    *,
    weights: str | None = None,
    cache: Path | None = None,
    labelled: bool = True,
) -> Workload:
    """Open images for a model, decoded and cropped to its input, with labels in its head's class numbering.

    ``weights`` is what ``open_model`` will be given: a file's head decides how many classes there are. ``cache`` is the
    folder that keeps the decoded images (None: memory only). Without ``labelled`` no classes are looked for, neither of
    the images nor of the model.
    """
    check_limit(source.limit)
    check_model(model)
    if source.name in embedded.WORKLOADS:
        return _embedded(source, model)
    frames = clip_frames(model)
    if source.name == VIDEOS:
        return _clips(source, model, frames, weights=weights, cache=cache, labelled=labelled)
    if frames is not None:
        other = MOVING if model in readers(MOVING) else f"{VIDEOS} DATA=FOLDER"
        raise WorkloadError(f"{model} reads clips, and {source.name} has images: use WORKLOAD={other}")
    _refuse_sampling(source)
    family = source.name.partition(":")[0]
    if source.name != "imagefolder" and (":" not in source.name or family not in FAMILIES):
        raise WorkloadError(_unknown(source.name))
    options: dict[str, Any] = {
        "data": source.data,
        "head": head_classes(model, weights=weights) if labelled else None,
        "preprocess": Preprocess.from_config(input_config(model), resize=source.resize),
        "limit": source.limit,
        "strict": source.strict,
        "cache": cache,
        "reading": source.reading,
        "labelled": labelled,
    }
    if source.name == "imagefolder":
        return open_image_folder(**options)
    return open_named(source.name, download=source.download, **options)


def split_calibration(workload: Workload) -> tuple[Workload, Workload]:
    """(images to calibrate on, images to evaluate), disjoint.

    Scenes can be drawn without end, so the embedded workloads are evaluated whole and further ones calibrate; others
    are split.
    """
    if workload.name in embedded.CALIBRATIONS:
        return embedded.CALIBRATIONS[workload.name](len(workload)), workload
    return base.split_calibration(workload)


def _clips(
    source: ImageSource, model: str, frames: int | None, *, weights: str | None, cache: Path | None, labelled: bool
) -> Workload:
    if frames is None:
        raise WorkloadError(f"{model} reads images, and {source.name} has clips: use a model of clips (docs/video.md)")
    one = Preprocess.from_config(input_config(model), resize=source.resize)
    return folder.open_clips(
        source.data,
        head=head_classes(model, weights=weights) if labelled else None,
        names=class_names(model) if labelled else (),
        prepare=ClipPreprocess(one, frames, source.sampling, reader.decoder_version()),
        limit=source.limit,
        strict=source.strict,
        cache=cache,
        reading=source.reading,
        labelled=labelled,
    )


def _refuse_sampling(source: ImageSource) -> None:
    if source.sampling != ONE_VIEW:
        raise WorkloadError(
            f"STRIDE and VIEWS are for clips, and {source.name} takes its samples whole: leave them out (--stride, "
            "--views)"
        )


def _embedded(source: ImageSource, model: str) -> Workload:
    _refuse_sampling(source)
    if source.reading != AS_USUAL:
        raise WorkloadError(
            "the embedded workload makes its own images and labels: leave LABELS and LINKS (--labels, --no-links) out"
        )
    if source.data:
        raise WorkloadError(
            f"the embedded workload makes its own images: leave DATA={source.data} out, or use WORKLOAD=imagefolder"
        )
    if model not in readers(source.name):
        raise WorkloadError(embedded_needs(model, source.name))
    return embedded.WORKLOADS[source.name](embedded.IMAGES[source.name] if source.limit is None else source.limit)


def _unknown(name: str) -> str:
    kinds = available_workloads()
    near = difflib.get_close_matches(name, kinds, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown workload {name!r}: {hint}choose {', '.join(kinds)}"
