"""From the names of a data set's classes to the class indices of a model's head."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset

from ablations.workloads.base import WorkloadError
from ablations.workloads.reading import INDEX, ORDER

log = logging.getLogger(__name__)

_IMAGENET_1K = 1000
_SPLITS = {"val", "validation", "valid", "test", "testing", "eval", "train", "training"}


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
    used: Sequence[str], empty: Sequence[str], *, head: int | None, where: str, rule: str | None = None
) -> tuple[dict[str, int], int, tuple[str, ...]]:
    """(class index of each folder that is ``used``, classes of the head, the empty ones that are classes too).

    An empty folder keeps its number, or every class behind it would be taken for another. Where the head has just as
    many classes as folders with images, or the names say by themselves which class they are, folders without images
    need not be classes. ``rule`` is what a person said of the names: see ``reading``.
    """
    known = imagenet_indices(_IMAGENET_1K if head is None else head) or {}
    if rule != ORDER and all(name in known for name in used):
        counting, missing = list(used), [name for name in empty if name in known]
    elif rule == INDEX:
        counting, missing = list(used), [name for name in empty if _number(name) is not None]
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
    names = _number_order(counting) if known and _complete(counting, head) else natural_order(counting)
    indices, classes = class_indices(names, head=head, where=where, rule=rule)
    label_of = dict(zip(names, indices.tolist(), strict=True))
    return {name: label_of[name] for name in used}, classes, tuple(missing)


def class_indices(
    names: Sequence[str], *, head: int | None, where: str, rule: str | None = None, published: bool = False
) -> tuple[np.ndarray, int]:
    """The head's class index of each named class, and the number of classes of that head.

    WordNet ids of the head's ImageNet set count by id, whatever their order and however few they are; names ``0`` …
    ``N - 1``, all of them, are indices. Any other names count in the given order, and there must be exactly as many as
    the head has classes; under a head of ImageNet's only where ``rule`` or a ``published`` numbering says that the
    order is the head's. ``head=None`` is a head still to be made (random weights), which follows the names.
    """
    known = imagenet_indices(_IMAGENET_1K if head is None else head)
    if rule == INDEX:
        return _by_index(names, head=head, where=where)
    if rule != ORDER and known is not None and all(name in known for name in names):
        return np.array([known[name] for name in names], dtype=np.int64), len(known) if head is None else head
    if head is None or len(names) == head:
        if head is None or known is None or rule == ORDER or published:
            return np.arange(len(names), dtype=np.int64), len(names)
        if _complete(names, head):
            return np.array([int(name) for name in names], dtype=np.int64), head
    raise WorkloadError(f"{where}{_refusal(names, known, head=head, rule=rule)}{_called_like_splits(names, where)}")


def _by_index(names: Sequence[str], *, head: int | None, where: str) -> tuple[np.ndarray, int]:
    """Names as the indices they write, however few there are."""
    numbers = [_number(name) for name in names]
    classes = head or max((number for number in numbers if number is not None), default=0) + 1
    wrong = [name for name, number in zip(names, numbers, strict=True) if number is None or number >= classes]
    if wrong:
        raise WorkloadError(
            f"{where}: LABELS=index takes folders for indices 0..{classes - 1} of the model's head, and "
            f"{len(wrong)} of {len(names)} names are none ({_listed(wrong)}): rename or move them, or leave LABELS out"
        )
    if len(set(numbers)) < len(numbers):
        twice = [name for name, number in zip(names, numbers, strict=True) if numbers.count(number) > 1]
        raise WorkloadError(f"{where}: {_listed(twice)} are the same index twice: put their images into one folder")
    return np.array(numbers, dtype=np.int64), classes


def _number(name: str) -> int | None:
    """The number that a name writes, zeros in front or not."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else None


def _complete(names: Sequence[str], head: int | None) -> bool:
    """Whether the names are 0 … N - 1, each once."""
    return head is not None and sorted(-1 if (n := _number(name)) is None else n for name in names) == list(range(head))


def _number_order(names: Sequence[str]) -> list[str]:
    return sorted(names, key=int)


def _refusal(names: Sequence[str], known: dict[str, int] | None, *, head: int | None, rule: str | None) -> str:
    if known is None or rule == ORDER:
        order = "LABELS=order takes each folder for a class: " if rule == ORDER else ""
        these = "this class" if len(names) == 1 else f"these {len(names)} classes"
        return (
            f" has {_classes(len(names))}, but the model's head has {head}: {order}"
            f"choose a model (or WEIGHTS) trained on {these}"
        )
    strangers = [name for name in names if name not in known]
    if len(names) == head:
        ways = "say LABELS=order if these folders, sorted, are the classes of the head in its order"
    elif all(_number(name) is not None for name in names):
        ways = f"say LABELS=index if they are indices of the head, which count from 0 to {len(known) - 1}"
    else:
        ways = f"choose a model (or WEIGHTS) with a head of {_classes(len(names))}"
    return (
        f": {len(strangers)} of {len(names)} class names are no WordNet ids of the {head} ImageNet classes the "
        f"model knows ({_listed(strangers)}). "
        f"Name each class by its WordNet id (as in n01440764) and move anything else out, or {ways}"
    )


def _called_like_splits(names: Sequence[str], where: str) -> str:
    alike = sorted(name for name in names if name.lower() in _SPLITS)
    if not alike:
        return ""
    if len(alike) < len(names):
        return f". Or is one of {_listed(alike)} what to evaluate? Then name it, as in DATA={where}/{alike[-1]}"
    return (
        f". Or are {_listed(alike)} splits? Their images lie in no class folders: put them into some, or give the "
        "labels of those to evaluate with LABELS=FILE"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")


def _classes(count: int) -> str:
    return f"{count} class{'' if count == 1 else 'es'}"
