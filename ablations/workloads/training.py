"""The images a workload is trained on: never those it is evaluated on.

The embedded workloads draw scenes or clips of their endless train split, once, into a memory map. Image folders read
DATA/train beside DATA/val, or the folder named by --train-data. Which picture a place in an epoch gives is a function
of (seed, epoch, image) alone, so that a restart, and any number of loading processes, sees the same pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablations.models.clips import CLIP_CANVAS, DIRECTIONS, FRAMES
from ablations.models.digits import CANVAS, CLASSES, EMBEDDED, EMBEDDED_V1, MOVING, SHIPPED, VIDEOS, normalise
from ablations.models.loading import input_config
from ablations.records.files import atomic, locked, user_path
from ablations.workloads import digits, embedded, moving_digits, pairs
from ablations.workloads.base import Workload, WorkloadError, data_digest, pixel_digest
from ablations.workloads.folders.splits import class_root
from ablations.workloads.photographs import Augment, Photographs, Place, sample_seed
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.reading import ImageSource, Reading

log = logging.getLogger(__name__)

SCENES = 24_576  # of the embedded train split, drawn once: six epochs of 4096 without repetition
CLIPS_DRAWN = 6_144  # clips of moving digits, at most: eight times the pixels
SCENE_SEED = 1  # the shipped weights were trained on the scenes of seed 0
SHIFT = 4  # pixels by which the light augmentation of scenes moves them, at most: half a patch
_FOLDERS = ("train", "training")
_KINDS = {  # in digests and file names
    EMBEDDED: ("pairs", pairs.VERSION),
    EMBEDDED_V1: ("digits", digits.VERSION),
    MOVING: ("moving", moving_digits.VERSION),
}


@dataclass(frozen=True)
class TrainingAccess:
    """Where the training images of a run are: plain values, so that a worker can be told."""

    source: ImageSource
    model: str
    cache: Path  # OUT/cache
    classes: int | None = None  # of the model's head
    scenes: int = SCENES

    def open(self, *, augment: Augment, holdout: int, seed: int, evaluated: Workload | None = None) -> TrainingImages:
        """The training images; ``evaluated`` are those they must be disjoint from and agree with on classes."""
        source = self.source
        if source.name == VIDEOS:
            raise WorkloadError(
                "nothing is finetuned on folders of videos yet: leave the training out, or use WORKLOAD=moving_digits"
            )
        if source.name in SHIPPED:
            if source.train_data:
                raise WorkloadError("the embedded workload draws its own training scenes: leave --train-data out")
            count = min(self.scenes, CLIPS_DRAWN) if source.name == MOVING else self.scenes
            return Scenes(self.cache, count=count, augment=augment, holdout=holdout, seed=seed, workload=source.name)
        root = training_root(source.data, source.train_data, workload=source.name, reading=source.reading)
        return Photographs(
            root,
            head=self.classes,
            preprocess=Preprocess.from_config(input_config(self.model), resize=source.resize),
            cache=self.cache,
            augment=augment,
            holdout=holdout,
            seed=seed,
            evaluated=evaluated,
            apart_from=class_root(source.data, source.reading) if source.name == "imagefolder" else None,
            reading=source.reading,
        )


def training_root(data: str | None, train_data: str | None, *, workload: str, reading: Reading | None = None) -> Path:
    """The folder that holds the training images' class folders; refuses the one that is evaluated."""
    if train_data is None and workload != "imagefolder":
        raise WorkloadError(f"the training images of {workload} are not known: name their folder with --train-data")
    evaluated = class_root(data, reading) if workload == "imagefolder" else None
    if train_data is not None:
        root = user_path(train_data).absolute()
        if not root.is_dir():
            raise WorkloadError(f"--train-data {train_data} is no folder: give the folder that holds the class folders")
    else:
        assert evaluated is not None
        # where DATA is a link, what lies beside it, else what lies beside the folder that it leads to
        beside = [place / name for place in (evaluated.parent, evaluated.resolve().parent) for name in _FOLDERS]
        found = [folder for folder in beside if folder.is_dir() and folder.resolve() != evaluated.resolve()]
        if not found:
            raise WorkloadError(
                f"no training images beside {evaluated}: put them into {beside[0]}, or name their folder with "
                "--train-data; evaluated images are never trained on"
            )
        root = found[0]
    ends = root.resolve(), (evaluated or root).resolve()
    if evaluated is not None and (ends[0].is_relative_to(ends[1]) or ends[1].is_relative_to(ends[0])):
        raise WorkloadError(f"the training images {root} overlap with the evaluated ones {evaluated}; keep them apart")
    return root


# --- embedded ---------------------------------------------------------------------------------------------------------


class Scenes(Dataset[tuple[Tensor, int]]):
    """((1, 64, 64) float32, label) by (epoch, scene): ``count`` scenes of the train split, drawn once; of moving digits
    ((F, 1, 48, 48) float32, direction).

    ``held_out`` are further scenes of that split, never trained on.

    The light augmentation moves a scene by up to half a patch, so that no digit keeps its place on the patch grid; all
    frames of a clip alike, over its torus. Digits are neither mirrored nor turned: a 6 is no 9.
    """

    def __init__(
        self, cache: Path, *, count: int, augment: Augment, holdout: int, seed: int, workload: str = EMBEDDED
    ) -> None:
        if augment == "strong":
            raise WorkloadError("augment 'strong' is for photographs: use 'light' or 'none' on the embedded workload")
        if count < 1:
            raise WorkloadError(f"{count} training scenes are none: give 1 or more")
        self.name = workload
        self.classes = DIRECTIONS if workload == MOVING else CLASSES
        self.pixels, self.labels = drawn_scenes(cache, 0, count, workload=workload)
        self.held_out: Workload | None = None
        if holdout:
            pixels, labels = drawn_scenes(cache, count, count + holdout, workload=workload)
            ids = tuple(f"train/{SCENE_SEED}/{index}" for index in range(count, count + holdout))
            like = embedded.WORKLOADS[workload](1)
            digest = data_digest(pixels, labels=labels, ids=ids, mean=like.mean, std=like.std)
            self.held_out = Workload(
                name=f"{workload} train", pixels=pixels, labels=labels, ids=ids, mean=like.mean, std=like.std,
                classes=self.classes, digest=digest,
            )  # fmt: skip
        kind, version = _KINDS[workload]
        content = {kind: version, "split": "train", "seed": SCENE_SEED, "count": count}
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._shift = SHIFT if augment == "light" else 0
        self._seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        epoch, index = place
        image = np.array(self.pixels[index, ..., 0])
        if self._shift:
            random_state = np.random.RandomState(sample_seed(self._seed, epoch, index))
            by = random_state.randint(-self._shift, self._shift + 1, size=2)
            image = np.roll(image, by, axis=(1, 2)) if self.name == MOVING else shifted(image, *by)
        seen = normalise(torch.from_numpy(image if self.name == MOVING else image[None]))
        return seen if self.name == MOVING else seen[0], int(self.labels[index])


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """An image (H, W) moved over its black ground; what leaves it is cut."""
    height, width = image.shape
    moved = np.zeros_like(image)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def drawn_scenes(cache: Path, start: int, stop: int, *, workload: str = EMBEDDED) -> tuple[np.ndarray, np.ndarray]:
    """Scenes ``start`` … ``stop - 1`` of the train split: pixels (n, 64, 64, 1) uint8, of clips (n, F, 48, 48, 1), and
    labels (n,) int64.
    """
    folder = cache / "training"
    folder.mkdir(parents=True, exist_ok=True)
    kind, version = _KINDS[workload]
    stem = f"{kind}-v{version}-seed{SCENE_SEED}-{start}-{stop}"
    paths = folder / f"{stem}.npy", folder / f"{stem}-labels.npy", folder / f"{stem}.sha256"
    size = (FRAMES, CLIP_CANVAS, CLIP_CANVAS) if workload == MOVING else (CANVAS, CANVAS)
    shape = (stop - start, *size, 1)
    with locked(folder / f"{stem}.lock", what="drawing the training scenes"):
        found = _mapped(*paths, shape)
        if found is None:
            log.info("drawing %d training scenes, once", stop - start)
            pixels, labels = np.empty(shape, dtype=np.uint8), np.empty(stop - start, dtype=np.int64)
            for row, index in enumerate(range(start, stop)):
                pixels[row, ..., 0], labels[row] = _drawn(workload, index)
            arrays: tuple[np.ndarray, ...] = pixels, labels
            for path, array in zip(paths, arrays, strict=False):
                with atomic(path) as temporary, temporary.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
            with atomic(paths[2]) as temporary:  # last: it marks a whole pair
                temporary.write_text(_digests(pixels, labels), encoding="utf-8")
            found = _mapped(*paths, shape)
    assert found is not None, "what was just written can be read"
    return found


def _drawn(workload: str, index: int) -> tuple[np.ndarray, int]:
    """What a scene or clip shows, without a channel, and its label."""
    if workload == MOVING:
        clip = moving_digits.render("train", index, seed=SCENE_SEED)
        return clip.frames, clip.direction
    scene = (digits.render if workload == EMBEDDED_V1 else pairs.render)("train", index, seed=SCENE_SEED)
    return scene.image, scene.label


def _mapped(pixels: Path, labels: Path, digests: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Both arrays, or None where they are missing or damaged and have to be made again."""
    try:
        found = np.load(pixels, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False)
        whole = found[0].shape == shape and found[1].shape == shape[:1]
        whole = whole and _digests(*found) == digests.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  # a damaged header can make numpy raise nearly anything
        log.warning("%s is damaged (%s): drawing it again", pixels, error)
        return None
    if not whole:
        log.warning("%s is not what was drawn: drawing it again", pixels)
    return found if whole else None


def _digests(pixels: np.ndarray, labels: np.ndarray) -> str:
    return f"{pixel_digest(pixels)} {pixel_digest(labels)}"


TrainingImages = Scenes | Photographs
