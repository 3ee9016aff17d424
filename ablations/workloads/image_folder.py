"""Image folders: one folder a class, in ImageNet's layout or any other.

Class indices come from the WordNet ids where the model knows them, never from the order of the folders, so any subset
of the 1000 classes can be evaluated. Where DATA holds splits (train, val, …), the validation split is taken.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ablations.workloads.account import Account, Entry
from ablations.workloads.base import Workload, WorkloadError, refuse_or_keep, spread_subset
from ablations.workloads.classes import folder_classes
from ablations.workloads.copies import find_copies
from ablations.workloads.decode import Loaded, Source, decode, read_image
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import (
    BROKEN_LINK,
    FOLDER_LINK,
    OUTSIDE_LINK,
    SPECIAL,
    UNREADABLE_FOLDER,
    reason_of,
)

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
    empty: tuple[str, ...]  # class folders without any image file
    skipped: tuple[Entry, ...]
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
    """Open a folder of class folders for a model whose head has ``head`` classes (None: random weights, any number).

    Files that are there twice count once, and not at all where their labels differ: see ``copies``.
    """
    found = find_images(class_root(data))
    label_of, classes, empty = folder_classes(list(found.files), found.empty, head=head, where=str(found.root))
    entries = sorted((image_id(path, found.root), label_of[cls], path) for cls in label_of for path in found.files[cls])
    positions = spread_subset([entry[0] for entry in entries], [entry[1] for entry in entries], limit)
    chosen = [entries[position] for position in positions]
    decoded = decode(
        [image_source(*entry) for entry in chosen],
        preprocess=preprocess,
        cache=cache,
        origin=str(found.root),
        unwanted=lambda: find_copies(chosen),
    )
    skipped = refuse_or_keep([*found.skipped, *decoded.skipped], strict=strict, name=str(found.root))
    account = Account(
        found=len(entries) + len(found.skipped),
        used=len(decoded.ids),
        left_out=len(entries) - len(chosen),
        notes=decoded.notes,
        empty_classes=tuple(sorted(map(_printable, (*empty, *_emptied(found, decoded.skipped))))),
        ignored=found.ignored,
    )
    if account.empty_classes:
        log.warning("%s: no image that can be used in %s", found.root, ", ".join(account.empty_classes[:10]))
    return decoded.workload(
        name, preprocess=preprocess, labels=decoded.labels, classes=classes, skipped=skipped, account=account
    )


def _emptied(found: FoundImages, skipped: tuple[Entry, ...]) -> list[str]:
    """Classes that have image files, but none that can be used."""
    useless = {name for name, _ in skipped}
    return [cls for cls, paths in found.files.items() if all(image_id(path, found.root) in useless for path in paths)]


def class_root(data: str | None) -> Path:
    """The folder that directly holds the class folders: DATA itself, or its validation split."""
    if not data:
        raise WorkloadError("the workload imagefolder needs DATA=FOLDER, a folder with one folder for each class")
    root = Path(data).expanduser().resolve()
    if not root.exists():
        raise WorkloadError(f"DATA {data} does not exist: give the folder that holds the class folders")
    if not root.is_dir():
        raise WorkloadError(f"DATA {data} is a file: give the folder that holds the class folders")
    splits = {entry.name.lower(): entry for entry in _folders(root) if _holds_folders(entry)}
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
    skipped: list[Entry] = []
    empty: list[str] = []
    files: dict[str, list[Path]] = {}
    ignored = 0
    for folder in _folders(root, skipped):
        images = []
        for path in _walk(folder, root, skipped):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                ignored += 1
            elif (reason := _problem(path, root)) is not None:
                skipped.append((image_id(path, root), reason))
            else:
                images.append(path)
        if images:
            files[folder.name] = images
        else:
            empty.append(folder.name)
    if ignored:
        log.info("%s: %d files are no images by their names and were ignored", root, ignored)
    if not files:
        raise WorkloadError(_nothing_found(root, skipped))
    return FoundImages(root, files, tuple(empty), tuple(skipped), ignored)


def image_id(path: Path, root: Path) -> str:
    """The path relative to the class root, with forward slashes; bytes that are no UTF-8 are written as escapes."""
    return _printable(path.relative_to(root).as_posix())


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folders(root: Path, skipped: list[Entry] | None = None) -> list[Path]:
    """The visible sub-folders in sorted order; linked ones are not followed, and reported where asked."""
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise WorkloadError(f"the folder {root} cannot be read ({error.strerror}): check its permissions") from error
    folders = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if skipped is not None:
        skipped.extend((image_id(entry, root), _LINKED_FOLDER) for entry in folders if entry.is_symlink())
    return [entry for entry in folders if not entry.is_symlink()]


def _holds_folders(folder: Path) -> bool:
    try:
        return bool(_folders(folder))
    except WorkloadError:  # counted when its images are looked for
        return False


_LINKED_FOLDER = f"{FOLDER_LINK}: it is not followed, copy the folder itself"


def _walk(folder: Path, root: Path, skipped: list[Entry]) -> list[Path]:
    def unreadable(error: OSError) -> None:
        skipped.append((image_id(Path(error.filename), root), f"{UNREADABLE_FOLDER}: {error.strerror}"))

    paths = []
    for where, folders, names in os.walk(folder, onerror=unreadable, followlinks=False):
        paths += [Path(where, name) for name in names]
        links = [Path(where, name) for name in folders if Path(where, name).is_symlink()]
        skipped += [(image_id(link, root), _LINKED_FOLDER) for link in links]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(paths)


def _problem(path: Path, root: Path) -> str | None:
    """Why a file is not even opened, or None for a plain file, or a link to one, inside the folder.

    Opening a pipe would wait for ever, and a device is no picture.
    """
    linked = False
    try:
        mode = path.lstat().st_mode
        linked = stat.S_ISLNK(mode)
        if linked:
            target = path.resolve(strict=True)
            if not target.is_relative_to(root):
                return f"{OUTSIDE_LINK}: copy the file itself"
            mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        return BROKEN_LINK if linked else reason_of(error)
    return None if stat.S_ISREG(mode) else f"{SPECIAL}: a pipe, a socket or a device"


def _nothing_found(root: Path, skipped: list[Entry]) -> str:
    reasons = "; ".join(f"{file}: {reason}" for file, reason in skipped[:3])
    if reasons:
        return f"{root} has no image that can be used ({len(skipped)} skipped: {reasons})"
    if any(path.suffix.lower() in SUFFIXES for path in root.iterdir()):
        return f"{root} holds images but no class folders: put each image into a folder named after its class"
    return f"{root} holds no images: it needs one folder for each class, with images ({', '.join(sorted(SUFFIXES))})"


def image_source(name: str, label: int, path: Path) -> Source:
    """An image file of a folder, as ``decode`` takes it."""

    def load() -> Loaded:
        image, notes = read_image(path)
        return Loaded(image, label, notes)

    try:
        status = path.stat()
        stamp = f"{status.st_size}:{status.st_mtime_ns}:{label}"
    except OSError as error:  # loading will fail the same way, and be reported
        stamp = f"{error.strerror}:{label}"
    return Source(name, stamp, load)
