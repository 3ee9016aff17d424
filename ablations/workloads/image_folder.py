"""Image folders: one folder a class, in ImageNet's layout or any other.

Class indices come from the WordNet ids where the model knows them, never from the order of the folders, so any subset
of the 1000 classes can be evaluated. Where DATA holds splits (train, val, …), the validation split is taken.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ablations.workloads.base import Workload, WorkloadError, refuse_or_keep, spread_subset
from ablations.workloads.classes import class_indices, natural_order
from ablations.workloads.decode import Source, decode, load_image
from ablations.workloads.preprocess import Preprocess

log = logging.getLogger(__name__)

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_EVALUATED_SPLITS = (
    "val",
    "validation",
    "valid",
    "test",
    "testing",
    "eval",
)  # the first that is there is taken
_TRAINING_SPLITS = ("train", "training")


@dataclass(frozen=True)
class FoundImages:
    """The image files of a folder by class, and what was passed over."""

    root: Path  # the folder that holds the class folders
    files: dict[str, list[Path]]  # class name -> its image files, sorted by id
    skipped: tuple[tuple[str, str], ...]
    ignored: int  # files that do not call themselves images


def open_image_folder(
    data: str | None,
    *,
    head: int | None,
    preprocess: Preprocess,
    limit: int | None,
    strict: bool,
    cache: Path | None,
    name: str = "imagefolder",
) -> Workload:
    """Open a folder of class folders for a model whose head has ``head`` classes (None: random weights, any number)."""
    found = find_images(class_root(data))
    names = natural_order(list(found.files))
    indices, classes = class_indices(names, head=head, where=str(found.root))
    label_of = dict(zip(names, indices.tolist(), strict=True))
    entries = sorted((image_id(path, found.root), label_of[cls], path) for cls in names for path in found.files[cls])
    chosen = spread_subset([entry[0] for entry in entries], [entry[1] for entry in entries], limit)
    sources = [_source(*entries[position]) for position in chosen]
    decoded = decode(sources, preprocess=preprocess, cache=cache, origin=str(found.root))
    skipped = refuse_or_keep([*found.skipped, *decoded.skipped], strict=strict, name=str(found.root))
    return decoded.workload(name, preprocess=preprocess, labels=decoded.labels, classes=classes, skipped=skipped)


def class_root(data: str | None) -> Path:
    """The folder that directly holds the class folders: DATA itself, or its validation split."""
    if not data:
        raise WorkloadError("the workload imagefolder needs DATA=FOLDER, a folder with one folder for each class")
    root = Path(data).expanduser().resolve()
    if not root.exists():
        raise WorkloadError(f"DATA {data} does not exist: give the folder that holds the class folders")
    if not root.is_dir():
        raise WorkloadError(f"DATA {data} is a file: give the folder that holds the class folders")
    splits = {entry.name.lower(): entry for entry in _folders(root) if any(True for _ in _folders(entry))}
    evaluated = [splits[name] for name in _EVALUATED_SPLITS if name in splits]
    if not set(splits) <= {*_EVALUATED_SPLITS, *_TRAINING_SPLITS} or not splits:
        return root
    if not evaluated:
        raise WorkloadError(
            f"DATA {data} holds only a training split: add a validation split, "
            f"or name DATA={root / next(iter(splits.values())).name} if training images are meant"
        )
    log.info("%s holds splits: evaluating %s", data, evaluated[0].name)
    return evaluated[0]


def find_images(root: Path) -> FoundImages:
    """Every image file below each class folder, at any depth; links that leave the folder are skipped and reported."""
    skipped: list[tuple[str, str]] = []
    files: dict[str, list[Path]] = {}
    ignored = 0
    for folder in _folders(root, skipped):
        images = []
        for path in _walk(folder, root, skipped):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                ignored += 1
            elif (reason := _link_problem(path, root)) is not None:
                skipped.append((image_id(path, root), reason))
            else:
                images.append(path)
        if images:
            files[folder.name] = images
    if ignored:
        log.info("%s: %d files are no images by their names and were ignored", root, ignored)
    if not files:
        raise WorkloadError(_nothing_found(root, skipped))
    return FoundImages(root, files, tuple(skipped), ignored)


def image_id(path: Path, root: Path) -> str:
    """The path relative to the class root, with forward slashes; bytes that are no UTF-8 are written as escapes."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _folders(root: Path, skipped: list[tuple[str, str]] | None = None) -> list[Path]:
    """The visible sub-folders in sorted order; linked ones are not followed, and reported where asked."""
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise WorkloadError(f"the folder {root} cannot be read ({error.strerror}): check its permissions") from error
    folders = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if skipped is not None:
        skipped.extend((image_id(entry, root), _LINKED_FOLDER) for entry in folders if entry.is_symlink())
    return [entry for entry in folders if not entry.is_symlink()]


_LINKED_FOLDER = "a link to a folder, which is not followed: copy the folder itself"


def _walk(folder: Path, root: Path, skipped: list[tuple[str, str]]) -> list[Path]:
    def unreadable(error: OSError) -> None:
        skipped.append((image_id(Path(error.filename), root), f"the folder cannot be read: {error.strerror}"))

    paths = []
    for where, folders, names in os.walk(folder, onerror=unreadable, followlinks=False):
        paths += [Path(where, name) for name in names]
        links = [Path(where, name) for name in folders if Path(where, name).is_symlink()]
        skipped += [(image_id(link, root), _LINKED_FOLDER) for link in links]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(paths)


def _link_problem(path: Path, root: Path) -> str | None:
    """Why a link is not followed, or None for a plain file or a link that stays inside."""
    if not path.is_symlink():
        return None
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "a broken link"
    return None if target.is_relative_to(root) else "a link that leaves the folder: copy the file itself"


def _nothing_found(root: Path, skipped: list[tuple[str, str]]) -> str:
    reasons = "; ".join(f"{file}: {reason}" for file, reason in skipped[:3])
    if reasons:
        return f"{root} has no image that can be used ({len(skipped)} skipped: {reasons})"
    if any(path.suffix.lower() in SUFFIXES for path in root.iterdir()):
        return f"{root} holds images but no class folders: put each image into a folder named after its class"
    return f"{root} holds no images: it needs one folder for each class, with images ({', '.join(sorted(SUFFIXES))})"


def _source(name: str, label: int, path: Path) -> Source:
    def load() -> tuple[Image.Image, int]:
        return load_image(path), label

    try:
        status = path.stat()
        stamp = f"{status.st_size}:{status.st_mtime_ns}:{label}"
    except OSError as error:  # loading will fail the same way, and be reported
        stamp = f"{error.strerror}:{label}"
    return Source(name, stamp, load)
