"""What a workload is: decoded images or clips, their labels in the model's own class numbering, and a digest of both.

Every source of images (embedded, folders, named data sets) ends in the one frozen ``Workload``, so nothing behind it
knows where the images came from. What is said of an image here is said of a clip, which is one sample with one label.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ablations.workloads.account import Account

log = logging.getLogger(__name__)

CALIBRATION = 128  # images that settings are sought on
NO_LABEL = -1  # the label of each image of a workload without classes
_LOGGED = 10  # skipped images named in the log; the workload holds them all
_CHUNK = 256  # images hashed at once, so that a memory map never comes into memory whole


class WorkloadError(ValueError):
    """The images cannot be used as asked; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Workload:
    """Images or clips to evaluate: decoded once, already resized and cropped to the model's input."""

    name: str
    pixels: np.ndarray  # (n, H, W, C) uint8, of clips (n, views · F, H, W, C); may be a memory map
    labels: np.ndarray  # (n,) int64: class index of the model's head; NO_LABEL where there are no classes
    ids: tuple[str, ...]  # a stable name for each image
    mean: tuple[float, ...]  # per channel, of pixel / 255
    std: tuple[float, ...]
    classes: int  # size of the head the labels refer to; 0: nothing is known of classes
    digest: str  # sha256 over all that is evaluated: see ``data_digest``
    skipped: tuple[tuple[str, str], ...] = ()  # (file, reason) of what cannot be used
    masks: np.ndarray | None = None  # (n, H, W) or (n, F, H, W) bool: pixels of the object, where known
    clutter: np.ndarray | None = None  # (n,) int64, where known
    account: Account | None = None  # what became of all that was found; None where nothing had to be looked for
    second: np.ndarray | None = None  # (n,) int64: a label of another kind, where known (which digit moves)
    views: int = 1  # of each clip, whose answers are averaged

    def __post_init__(self) -> None:
        count = len(self.ids)
        if count == 0:
            raise WorkloadError(f"workload {self.name} holds no image")
        if self.pixels.dtype != np.uint8 or self.pixels.ndim not in (4, 5) or len(self.pixels) != count:
            raise WorkloadError(
                f"workload {self.name}: pixels must be ({count}, H, W, C) uint8, or ({count}, F, H, W, C) of clips, "
                f"not {self.pixels.shape} {self.pixels.dtype}"
            )
        if self.labels.shape != (count,):
            raise WorkloadError(f"workload {self.name}: needs one label for each of {count} images")
        if self.views < 1 or (self.views > 1 and (self.pixels.ndim == 4 or self.pixels.shape[1] % self.views)):
            raise WorkloadError(f"workload {self.name}: {self.pixels.shape} are no {self.views} views of each clip")
        self._check_labels()

    def _check_labels(self) -> None:
        if self.classes == 0 and (self.labels == NO_LABEL).all():
            return
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.classes))
        if len(outside):
            first = outside[0]
            raise WorkloadError(
                f"workload {self.name}: {len(outside)} of {len(self)} labels are outside 0..{self.classes - 1}, the "
                f"classes of the model's head (the first: {self.ids[first]} has {self.labels[first]}): correct them, "
                "or choose a model (or WEIGHTS) whose head has these classes"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def frames(self) -> int | None:
        """F of each view of a clip; None where these are images."""
        return self.pixels.shape[1] // self.views if self.pixels.ndim == 5 else None

    def batch(self, start: int, stop: int) -> Tensor:
        """Images ``start`` … ``stop - 1`` as the model reads them: (b, C, H, W), of clips (b · views, F, C, H, W), the
        views of each one after the other; float32, normalised.
        """
        part = torch.from_numpy(np.array(self.pixels[start:stop])).movedim(-1, -3).float() / 255
        if self.views > 1:
            part = part.unflatten(1, (self.views, -1)).flatten(0, 1)
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return ((part - mean) / std).contiguous()

    def thumbnail(self, index: int, steps: int | None = None) -> np.ndarray:
        """One image as (H, W, 3) uint8, for drawing; grey images repeat their channel. The frames of a clip (or the
        first of each of ``steps`` equal parts) are put one below the other, (F H, W, 3), so that its patches, counted
        frame by frame, lie on one grid; of several views, those of the first.
        """
        image = np.array(self.pixels[index])
        if image.ndim == 4:
            image = image[: self.frames]
            image = image[:: len(image) // (steps or len(image))]
            image = image.reshape(-1, *image.shape[2:])
        return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def pixel_digest(pixels: np.ndarray) -> str:
    """sha256 over the bytes of (n, H, W, C) images, or of clips."""
    digest = hashlib.sha256()
    for start in range(0, len(pixels), _CHUNK):
        digest.update(np.ascontiguousarray(pixels[start : start + _CHUNK]).data)
    return digest.hexdigest()


def data_digest(
    pixels: np.ndarray,
    *,
    labels: np.ndarray,
    ids: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    pixels_sha256: str | None = None,
    views: int = 1,
) -> str:
    """sha256 over everything about the data that can change a result: pixels, labels, names, order, normalisation.

    ``pixels_sha256`` spares hashing the pixels again where their ``pixel_digest`` is already known.
    """
    content = {
        "shape": list(pixels.shape),
        "pixels": pixels_sha256 or pixel_digest(pixels),
        "labels": labels.tolist(),
        "ids": list(ids),
        "mean": list(mean),
        "std": list(std),
        **({"views": views} if views > 1 else {}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves nothing to evaluate."""
    if limit is not None and limit < 1:
        raise WorkloadError(f"a limit of {limit} images leaves nothing to evaluate: give LIMIT 1 or more, or none")


def spread_subset(ids: Sequence[str], labels: Sequence[int], limit: int | None) -> list[int]:
    """Positions of at most ``limit`` images spread evenly over the classes, in their original order.

    Each class is put in the order of its ids' hashes, then the classes are dealt from in turn: the choice depends on
    the names alone, and a smaller limit takes a subset of a larger one.
    """
    check_limit(limit)
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    by_class: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for position, (name, label) in enumerate(zip(ids, labels, strict=True)):
        by_class[label].append((hashlib.sha256(name.encode()).hexdigest(), position))
    dealt = [(turn, *entry) for entries in by_class.values() for turn, entry in enumerate(sorted(entries))]
    return sorted(position for _, _, position in sorted(dealt)[:limit])


def subset(workload: Workload, positions: Sequence[int]) -> Workload:
    """Some images of a workload, in the order given."""
    chosen = list(positions)
    pixels, labels = np.asarray(workload.pixels[chosen]), workload.labels[chosen]
    ids = tuple(workload.ids[position] for position in chosen)
    return replace(
        workload,
        pixels=pixels,
        labels=labels,
        ids=ids,
        digest=data_digest(pixels, labels=labels, ids=ids, mean=workload.mean, std=workload.std, views=workload.views),
        masks=None if workload.masks is None else workload.masks[chosen],
        clutter=None if workload.clutter is None else workload.clutter[chosen],
        second=None if workload.second is None else workload.second[chosen],
    )


def split_calibration(workload: Workload, count: int = CALIBRATION) -> tuple[Workload, Workload]:
    """(images to calibrate on, images to evaluate): disjoint, and together all of them.

    Of n images, min(count, n // 4) calibrate, at least one: those whose ids have the smallest hashes. So the choice
    depends on the names alone, neither on their order nor on labels.
    """
    total = len(workload)
    if total < 2:
        raise WorkloadError(
            f"workload {workload.name} has one image: settings are sought on images that are not evaluated, give two "
            "or more"
        )
    by_hash = sorted(range(total), key=lambda i: (hashlib.sha256(workload.ids[i].encode()).hexdigest(), i))
    chosen = set(by_hash[: max(1, min(count, total // 4))])
    return (
        subset(workload, [i for i in range(total) if i in chosen]),
        subset(workload, [i for i in range(total) if i not in chosen]),
    )


def refuse_or_keep(skipped: Sequence[tuple[str, str]], *, strict: bool, name: str) -> tuple[tuple[str, str], ...]:
    """Images that cannot be used: an error that lists them under ``strict``, else what the workload reports."""
    if strict and skipped:
        listed = "; ".join(f"{file}: {reason}" for file, reason in skipped[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise WorkloadError(
            f"{name}: {len(skipped)} image(s) cannot be used ({listed}{more}). "
            "Repair or remove them, or run without --strict to skip and report them"
        )
    for file, reason in skipped[:_LOGGED]:
        log.warning("skipped %s: %s", file, reason)
    if len(skipped) > _LOGGED:
        log.warning("skipped %d more images of %s", len(skipped) - _LOGGED, name)
    return tuple(skipped)
