"""From the names of a data set's classes to the class indices of a model's head."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset

from ablations.workloads.base import WorkloadError

log = logging.getLogger(__name__)

_IMAGENET_1K = 1000


def natural_order(names: Sequence[str]) -> list[str]:
    """Class names in timm's order, in which numbers count as numbers: "2" comes before "10".

    torchvision's ``ImageFolder`` sorts as text instead; a warning says so where the two differ.
    """

    def key(name: str) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", name.lower())
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    ordered = sorted(sorted(names), key=key)
    if ordered != sorted(names):
        log.warning(
            "class folders are taken in timm's natural order (%s, …), not in text order (%s, …): "
            "a model trained with torchvision's ImageFolder would number them otherwise",
            ", ".join(ordered[:3]),
            ", ".join(sorted(names)[:3]),
        )
    return ordered


def imagenet_indices(classes: int) -> dict[str, int] | None:
    """WordNet id -> class index of a head of that size, or None where timm knows no ImageNet set of it."""
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return None
    indices: dict[str, int] = {}
    for index, wnid in enumerate(ImageNetInfo(subset).label_names()):
        indices.setdefault(wnid, index)
    return indices


def folder_classes(
    used: Sequence[str], empty: Sequence[str], *, head: int | None, where: str
) -> tuple[dict[str, int], int, tuple[str, ...]]:
    """(class index of each folder that is ``used``, classes of the head, the empty ones that are classes too).

    An empty folder keeps its number, or every class behind it would be taken for another. Where the head has just as
    many classes as folders with images, or the classes are WordNet ids, folders without images need not be classes.
    """
    known = imagenet_indices(_IMAGENET_1K if head is None else head) or {}
    if all(name in known for name in used):
        counting, missing = list(used), [name for name in empty if name in known]
    elif head == len(used):
        counting, missing = list(used), list(empty)
        if empty:
            log.warning(
                "%s: the model's head has %d classes, as many as there are folders with images: the empty folders %s "
                "are taken for no classes",
                where,
                head,
                ", ".join(empty),
            )
    else:
        counting, missing = [*used, *empty], list(empty)
    names = natural_order(counting)
    indices, classes = class_indices(names, head=head, where=where)
    label_of = dict(zip(names, indices.tolist(), strict=True))
    return {name: label_of[name] for name in used}, classes, tuple(missing)


def class_indices(names: Sequence[str], *, head: int | None, where: str) -> tuple[np.ndarray, int]:
    """The head's class index of each named class, and the number of classes of that head.

    WordNet ids of the head's ImageNet set count by id, whatever their order and however few they are; any other names
    count in the given order, and there must be exactly as many as the head has classes. ``head=None`` is a head
    still to be made (random weights), which follows the names.
    """
    known = imagenet_indices(_IMAGENET_1K if head is None else head)
    if known is not None and all(name in known for name in names):
        return np.array([known[name] for name in names], dtype=np.int64), len(known) if head is None else head
    if head is None or len(names) == head:
        return np.arange(len(names), dtype=np.int64), len(names)
    if known is None:
        raise WorkloadError(
            f"{where} has {len(names)} classes, but the model's head has {head}: "
            f"choose a model (or WEIGHTS) trained on these {len(names)} classes"
        )
    strangers = [name for name in names if name not in known]
    raise WorkloadError(
        f"{where}: {len(strangers)} of {len(names)} class names are no WordNet ids of the {head} ImageNet classes the "
        f"model knows ({', '.join(repr(name) for name in strangers[:5])}{', …' if len(strangers) > 5 else ''}). "
        f"Name each class by its WordNet id (as in n01440764) and move anything else out, "
        f"or choose a model (or WEIGHTS) with a head of {len(names)} classes"
    )
