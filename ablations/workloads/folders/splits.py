"""Which folder below DATA is evaluated, and which file holds its labels, where folders do not."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from errno import ELOOP
from pathlib import Path
from typing import Literal

from ablations.records.files import user_path
from ablations.workloads.base import WorkloadError
from ablations.workloads.folders.found import UNSORTED, folders_in, holds_images
from ablations.workloads.formats import suffixes
from ablations.workloads.reading import Reading

log = logging.getLogger(__name__)

EVALUATED_SPLITS = (
    "val",
    "validation",
    "valid",
    "test",
    "testing",
    "eval",
)  # the first that is there is taken
TRAINING_SPLITS = ("train", "training")
LABEL_FILES = ("val.txt", "LOC_val_solution.csv")  # ImageNet's: of Caffe's and of Kaggle's distribution

_Kind = Literal["classes", "images", "empty", "closed", "links"]


@dataclass(frozen=True)
class Place:
    """The folder that is evaluated, and the file of its labels; None: its folders are the classes."""

    folder: Path
    labels: Path | None = None


def find_place(data: str | None, reading: Reading) -> Place:
    """DATA itself or its validation split; and the labels where DATA's images lie in no class folders."""
    root = existing(data)
    folder = _evaluated(root, str(data), reading)
    return Place(folder, _labels(folder, root, reading))


def unlabelled_place(data: str | None, reading: Reading) -> Path:
    """DATA itself, or its validation split where DATA holds splits and no image beside them."""
    root = existing(data)
    if holds_images(root):
        return root
    kinds = {folder: _kind(folder, reading) for folder in _folders(root)}
    evaluated = [folder for folder in _called(kinds, EVALUATED_SPLITS) if kinds[folder] in ("classes", "images")]
    others = set(_filled(kinds)) - set(_called(kinds, (*EVALUATED_SPLITS, *TRAINING_SPLITS)))
    if not evaluated or others:
        return root
    log.info("%s holds splits: evaluating %s", data, evaluated[0].name)
    return evaluated[0]


def class_root(data: str | None, reading: Reading | None = None) -> Path:
    """The folder that ids are relative to: DATA itself, or its validation split."""
    return find_place(data, reading or Reading()).folder


def existing(data: str | None, workload: str = "imagefolder") -> Path:
    """DATA as a folder that is there."""
    if not data:
        raise WorkloadError(f"the workload {workload} needs DATA=FOLDER, a folder with one folder for each class")
    root = Path(os.path.abspath(user_path(data)))  # noqa: PTH100  not resolved: what lies beside a link counts
    remedy = "give the folder that holds the class folders"
    try:
        root.stat()
    except FileNotFoundError:
        what = "is a link that leads nowhere" if root.is_symlink() else "does not exist"
        raise WorkloadError(f"DATA {data} {what}: {remedy}") from None
    except OSError as error:
        what = "is a link in a circle" if error.errno == ELOOP else f"cannot be reached ({error.strerror})"
        raise WorkloadError(f"DATA {data} {what}: {remedy}") from error
    if not root.is_dir():
        raise WorkloadError(f"DATA {data} is a file: {remedy}")
    return root


def _evaluated(root: Path, data: str, reading: Reading) -> Path:
    kinds = {folder: _kind(folder, reading) for folder in _folders(root)}
    evaluated = _called(kinds, EVALUATED_SPLITS)
    splits = [*evaluated, *_called(kinds, TRAINING_SPLITS)]
    if not splits or any(_has_classes(folder) for folder in kinds if folder not in splits):
        return root
    usable = [one for one in evaluated if kinds[one] == "classes" or _labelled(one, kinds[one], root, reading)]
    if not any(kinds[one] == "classes" for one in splits) and (not usable or set(_filled(kinds)) - set(splits)):
        # images lie directly in each: then they may be classes that happen to be called so
        if len(_filled(kinds)) == 1 and evaluated and kinds[evaluated[0]] == "images":
            raise WorkloadError(f"DATA {data} holds no class folders but {_why(evaluated[0], 'images', reading)}")
        return root
    if usable:
        log.info("%s holds splits: evaluating %s", data, usable[0].name)
        return usable[0]
    if evaluated:
        raise WorkloadError(
            f"DATA {data} cannot be evaluated: {_why(evaluated[0], kinds[evaluated[0]], reading)}. "
            f"Or name the folder to evaluate with DATA=FOLDER"
        )
    raise WorkloadError(
        f"DATA {data} holds only a training split: add a validation split, "
        f"or name DATA={splits[0]} if training images are meant"
    )


def _folders(root: Path) -> list[Path]:
    """The visible folders and every link to one, followed or not: one that is not followed is explained."""
    return folders_in(root, links=True)


def _called(kinds: dict[Path, _Kind], names: tuple[str, ...]) -> list[Path]:
    """The folders of these names, in the order of the names."""
    by_name = {folder.name.lower(): folder for folder in kinds}
    return [by_name[name] for name in names if name in by_name]


def _filled(kinds: dict[Path, _Kind]) -> list[Path]:
    return [folder for folder, kind in kinds.items() if kind in ("classes", "images")]


def _kind(folder: Path, reading: Reading) -> _Kind:
    if folder.is_symlink() and not reading.links:
        return "links"
    try:
        if folders_in(folder, links=reading.links):
            return "classes"
        if holds_images(folder):
            return "images"
        return "links" if folders_in(folder) else "empty"
    except WorkloadError:
        return "closed"


def _why(folder: Path, kind: _Kind, reading: Reading) -> str:
    """Why a split cannot be evaluated."""
    if kind == "images":
        found = _beside(folder, folder.parent)
        if len(found) > 1:
            return _several(found)
        return f"{folder.name}/ holds images directly: {UNSORTED}"
    return f"{folder.name}/ " + {
        "closed": "cannot be read: check its permissions",
        "links": "is a link, or holds links alone, and links are not followed: run without --no-links (LINKS=no)",
        "empty": "holds neither class folders nor images: fill it",
    }.get(kind, "cannot be used")


def _has_classes(folder: Path) -> bool:
    """Whether a folder that is no split holds images further down: then it is a class, or a set of them."""
    endings = suffixes()
    try:
        if not folders_in(folder):
            return False
    except WorkloadError:
        return False
    for where, inner, names in os.walk(folder, followlinks=False):
        inner[:] = [name for name in inner if not name.startswith(".")]
        if any(Path(name).suffix.lower() in endings for name in (*names, *_linked(where, inner))):
            return True
    return False


def _linked(where: str, inner: list[str]) -> list[str]:
    """Names that stand for linked folders, which are taken to hold images."""
    return [".png" for name in inner if Path(where, name).is_symlink()]


# --- labels in a file -------------------------------------------------------------------------------------------------


def _labels(folder: Path, root: Path, reading: Reading) -> Path | None:
    if reading.file is not None:
        if not reading.file.is_file():
            raise WorkloadError(
                f"LABELS {reading.file} is no file: give a file of labels, or 'order' or 'index' for rules on the "
                "names of folders"
            )
        return reading.file.absolute()
    if reading.rule is not None or folders_in(folder, links=reading.links) or not holds_images(folder):
        return None
    found = _beside(folder, root)
    if len(found) > 1:
        raise WorkloadError(_several(found))
    return found[0] if found else None


def _labelled(folder: Path, kind: _Kind, root: Path, reading: Reading) -> bool:
    if kind != "images" or reading.rule is not None:
        return False
    return reading.file is not None or len(_beside(folder, root)) == 1


def _beside(folder: Path, root: Path) -> list[Path]:
    """Files of labels in a folder of images and in DATA."""
    places = dict.fromkeys((folder, root))
    return [place / name for place in places for name in LABEL_FILES if (place / name).is_file()]


def _several(found: list[Path]) -> str:
    return f"labels are in {' and in '.join(map(str, found))}: say which count with LABELS=FILE"
