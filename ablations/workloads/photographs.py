"""Photographs to train on: image files of class folders, augmented by timm."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from ablations.workloads.base import Workload, WorkloadError, refuse_or_keep
from ablations.workloads.classes import folder_classes
from ablations.workloads.decode import decode, load_image
from ablations.workloads.folders.found import FoundImages, find_all_images, find_images, image_id
from ablations.workloads.image_folder import image_source
from ablations.workloads.preprocess import Preprocess, convert
from ablations.workloads.reading import Reading

log = logging.getLogger(__name__)

_TRIES = 50  # images tried in place of one that cannot be read

Augment = Literal["none", "light", "strong"]
Place = tuple[int, int]  # (epoch, image)


class Photographs(Dataset[tuple[Tensor, int]]):
    """((C, H, W) float32, label) by (epoch, image): DeiT's augmentation (strong), crops and flips (light), or none.

    ``held_out`` are images of the same folder that are never trained on, and no image below ``apart_from`` may be.
    """

    name = "imagefolder"

    def __init__(
        self,
        root: Path,
        *,
        head: int | None,
        preprocess: Preprocess,
        cache: Path,
        augment: Augment,
        holdout: int,
        seed: int,
        evaluated: Workload | None = None,
        apart_from: Path | None = None,
        reading: Reading | None = None,
    ) -> None:
        reading = reading or Reading()
        found = find_images(root, links=reading.links)
        refuse_or_keep(found.skipped, strict=False, name=str(root))  # says what is not trained on
        label_of, self.classes, _ = folder_classes(
            list(found.files), found.empty, head=head, where=str(root), rule=reading.rule
        )
        _check_agreement(label_of, evaluated, root)
        if apart_from is not None:
            _check_apart(found, find_all_images(apart_from, links=reading.links))
        files = found.files.items()
        entries = sorted((image_id(path, root), label_of[cls], path) for cls, paths in files for path in paths)
        by_hash = sorted(entries, key=lambda entry: sample_seed("holdout", entry[0]))
        held = min(holdout, len(entries) // 10)  # a small folder has little to spare
        self.root = root
        self.entries = sorted(by_hash[held:])
        self._targets = found.targets
        self.held_out = self._held_out(by_hash[:held], preprocess, cache) if held else None
        sizes = [[name, label, path.stat().st_size] for name, label, path in self.entries]
        self.digest = hashlib.sha256(json.dumps([sizes, preprocess.describe()]).encode()).hexdigest()
        self._seed = seed
        self._channels = preprocess.channels
        self._transform = train_transform(preprocess, augment)

    def _held_out(self, entries: list[tuple[str, int, Path]], preprocess: Preprocess, cache: Path) -> Workload:
        sources = [image_source(*entry, target=self._targets.get(entry[2])) for entry in sorted(entries)]
        decoded = decode(sources, preprocess=preprocess, cache=cache, origin=f"held out of {self.root}")
        return decoded.workload(
            f"held out of {self.root.name}", preprocess=preprocess, labels=decoded.labels, classes=self.classes,
            skipped=decoded.skipped,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        epoch, index = place
        for attempt in range(_TRIES):
            name, label, path = self.entries[(index + attempt) % len(self)]
            try:
                image = convert(load_image(path), channels=self._channels)
            except Exception as error:  # noqa: BLE001  a broken file can make a decoder raise nearly anything
                log.warning("%s cannot be read (%s): the next image takes its place", name, error)
                continue
            with seeded(sample_seed(self._seed, epoch, index)):  # timm's transforms draw from the global generators
                return self._transform(image), label
        raise WorkloadError(f"{_TRIES} images in a row below {self.root} cannot be read: is the disk complete?")


def _check_agreement(label_of: dict[str, int], evaluated: Workload | None, root: Path) -> None:
    """The same class folder must mean the same class in both sets, or training would teach the wrong names."""
    if evaluated is None:
        return
    for name, label in zip(evaluated.ids, evaluated.labels.tolist(), strict=True):
        folder = name.split("/")[0]
        if label_of.get(folder, label) != label:
            raise WorkloadError(
                f"the class {folder!r} is number {label} among the evaluated images and {label_of[folder]} below "
                f"{root}: both need the same class folders"
            )


def _check_apart(found: FoundImages, evaluated: FoundImages) -> None:
    """Links must not lead to the evaluated images: those are never trained on."""
    if not found.targets and not evaluated.targets:
        return  # the folders are apart
    theirs = {evaluated.real(path) for paths in evaluated.files.values() for path in paths}
    shared = [path for paths in found.files.values() for path in paths if found.real(path) in theirs]
    if shared:
        raise WorkloadError(
            f"{len(shared)} training images are, behind links, images to evaluate (the first: {shared[0]}): take these "
            "links out; evaluated images are never trained on"
        )


def train_transform(preprocess: Preprocess, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """A picture as the model is to see it in training: (C, H, W) float32, normalised."""
    common: dict[str, Any] = {
        "input_size": (preprocess.channels, *preprocess.size), "interpolation": preprocess.interpolation,
        "mean": preprocess.mean, "std": preprocess.std,
    }  # fmt: skip
    if augment == "strong":  # DeiT's
        deit: dict[str, Any] = {
            "color_jitter": 0.3,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "re_prob": 0.25,
            "re_mode": "pixel",
        }
        if preprocess.channels == 1:  # RandAugment's colour operations know no grey images
            deit = {"color_jitter": 0.0, "re_prob": 0.25, "re_mode": "pixel"}
        transform: Callable[[Image.Image], Tensor] = create_transform(is_training=True, **deit, **common)
        return transform
    if augment == "light":
        light: Callable[[Image.Image], Tensor] = create_transform(
            is_training=True, scale=(0.25, 1.0), color_jitter=0.0, **common
        )
        return light
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (preprocess.mean, preprocess.std))
    return lambda image: (torch.from_numpy(preprocess(image).copy()).permute(2, 0, 1).float() / 255 - mean) / std


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators seeded, and put back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def sample_seed(*parts: object) -> int:
    """A 32-bit seed from anything that has a text; the same on every machine."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big")
