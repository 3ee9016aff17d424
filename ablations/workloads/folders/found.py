"""The image files below a folder, and what became of all else that lies there.

Links are followed wherever they lead, as torchvision and timm do, with two rules that end every circle: a link to a
folder that holds the one being read is not followed, and of one class no folder is read twice. Names stay those inside
the folder.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from errno import ELOOP
from pathlib import Path

from ablations.workloads.account import Entry
from ablations.workloads.base import WorkloadError
from ablations.workloads.formats import suffixes
from ablations.workloads.problems import (
    BROKEN_LINK,
    CIRCLE,
    FOLDER_LINK,
    FOLDER_TWICE,
    OUTSIDE_LINK,
    SPECIAL,
    UNREADABLE_FOLDER,
    reason_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundImages:
    """The image files of a folder by class, and what was passed over."""

    root: Path  # the folder that holds the class folders
    files: dict[str, list[Path]]  # class name -> its image files, sorted; one class "" where classes are not looked at
    empty: tuple[str, ...]  # class folders without any image file
    skipped: tuple[Entry, ...]
    ignored: int  # files that do not call themselves images
    targets: Mapping[Path, str]  # where a file that is a link, or lies behind one, really is

    def real(self, path: Path) -> str:
        """Where an image file really is."""
        return self.targets.get(path) or str(Path(os.path.realpath(self.root), path.relative_to(self.root)))


def find_images(root: Path, *, links: bool = True) -> FoundImages:
    """Every image file below each class folder, at any depth; what cannot be read is skipped and reported."""
    found = find_files(root, suffixes(), links=links)
    if not found.files:
        raise WorkloadError(_nothing_found(root, found.skipped))
    return found


def find_files(root: Path, endings: frozenset[str], *, links: bool = True) -> FoundImages:
    """``find_images`` for files whose names end in one of ``endings``, as ``suffixes`` has them; there may be none."""
    scan = _Scan(root, links=links, endings=endings)
    files: dict[str, list[Path]] = {}
    empty: list[str] = []
    for folder in folders_in(root, links=links, skipped=scan.skipped):
        images = scan.images(folder)
        if images:
            files[folder.name] = images
        else:
            empty.append(folder.name)
    return scan.found(files, empty)


def find_all_files(root: Path, endings: frozenset[str], *, links: bool = True) -> FoundImages:
    """``find_all_images`` for files whose names end in one of ``endings``; there may be none."""
    scan = _Scan(root, links=links, endings=endings)
    return scan.found({"": scan.images(root)}, [])


def find_all_images(root: Path, *, links: bool = True) -> FoundImages:
    """Every image file in a folder and at any depth below it, whatever the folders mean."""
    found = find_all_files(root, suffixes(), links=links)
    if not found.files[""]:
        raise WorkloadError(_nothing_found(root, found.skipped))
    return found


def folders_in(root: Path, *, links: bool = True, skipped: list[Entry] | None = None) -> list[Path]:
    """The visible sub-folders in sorted order; what is a link and cannot be followed is added to ``skipped``."""
    folders = []
    for entry in _entries(root):
        path = root / entry.name
        if entry.name.startswith("."):
            continue
        if not entry.is_symlink():
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            continue
        reason, is_folder = _linked_folder(path, root, links=links)
        if reason is None and is_folder:
            folders.append(path)
        elif reason is not None and skipped is not None:
            skipped.append((image_id(path, root), reason))
    return folders


def image_id(path: Path, root: Path) -> str:
    """The path relative to the class root, with forward slashes; bytes that are no UTF-8 are written as escapes."""
    return printable(path.relative_to(root).as_posix())


def printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Folder:
    path: Path
    real: str
    linked: bool  # whether a link led here
    above: frozenset[str]  # the real folders on the way here


class _Scan:
    """One reading of a folder; it counts what it passes over."""

    def __init__(self, root: Path, *, links: bool, endings: frozenset[str]) -> None:
        self._root, self._links, self._suffixes = root, links, endings
        self._real_root = os.path.realpath(root)
        self.skipped: list[Entry] = []
        self._targets: dict[Path, str] = {}
        self._ignored = 0

    def found(self, files: dict[str, list[Path]], empty: list[str]) -> FoundImages:
        if self._ignored:
            log.info(
                "%s: %d files are none of those looked for by their names and were ignored", self._root, self._ignored
            )
        return FoundImages(self._root, files, tuple(empty), tuple(self.skipped), self._ignored, self._targets)

    def images(self, top: Path) -> list[Path]:
        """The image files of one class, sorted. Plain folders come before linked ones: a folder that is there twice is
        read under its own name.
        """
        read: set[str] = set()
        images: list[Path] = []
        plain = [_Folder(top, os.path.realpath(top), top.is_symlink(), frozenset((self._real_root,)))]
        behind_links: deque[_Folder] = deque()
        while plain or behind_links:
            folder = plain.pop() if plain else behind_links.popleft()
            if folder.real in read:
                self._skip(folder.path, f"{FOLDER_TWICE}: it is read once")
                continue
            read.add(folder.real)
            for entry in self._listed(folder):
                path = folder.path / entry.name
                if self._is_folder(entry, path):
                    inner = self._inner(folder, path, linked=entry.is_symlink())
                    if inner is not None:
                        (behind_links if entry.is_symlink() else plain).append(inner)
                elif self._is_image(entry, path, folder):
                    images.append(path)
        return sorted(images)

    def _listed(self, folder: _Folder) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder.path) as entries:
                yield from sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._skip(folder.path, f"{UNREADABLE_FOLDER}: {error.strerror}")

    def _is_folder(self, entry: os.DirEntry[str], path: Path) -> bool:
        return path.is_dir() if entry.is_symlink() else entry.is_dir(follow_symlinks=False)

    def _inner(self, folder: _Folder, path: Path, *, linked: bool) -> _Folder | None:
        """A folder to read as well, or None, said where it is not hidden."""
        if path.name.startswith("."):
            return None
        real = os.path.realpath(path) if linked else str(Path(folder.real, path.name))
        above = folder.above | {folder.real}
        if linked and not self._links:
            self._skip(path, _NOT_FOLLOWED)
        elif linked and any(_holds(real, one) for one in above):
            self._skip(path, f"{CIRCLE}: it leads to a folder that holds it")
        else:
            return _Folder(path, real, folder.linked or linked, above)
        return None

    def _is_image(self, entry: os.DirEntry[str], path: Path, folder: _Folder) -> bool:
        if entry.name.startswith(".") or path.suffix.lower() not in self._suffixes:
            self._ignored += 1
            return False
        linked = entry.is_symlink()
        reason = self._problem(path) if linked or not entry.is_file(follow_symlinks=False) else None
        if reason is not None:
            self._skip(path, reason)
        elif linked or folder.linked:
            self._targets[path] = os.path.realpath(path)
        return reason is None

    def _problem(self, path: Path) -> str | None:
        """Why a link, or what is no plain file, is not even opened, or None for a link that is followed.

        Opening a pipe would wait for ever, and a device is no picture.
        """
        try:
            mode = path.stat().st_mode
        except OSError as error:
            return _broken(error)
        if not self._links and not _holds(self._real_root, os.path.realpath(path)):
            return f"{OUTSIDE_LINK}: copy the file itself, or let links be followed (without --no-links)"
        return None if stat.S_ISREG(mode) else f"{SPECIAL}: a pipe, a socket or a device"

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append((image_id(path, self._root), reason))


_NOT_FOLLOWED = f"{FOLDER_LINK}: it is not followed, copy the folder itself, or run without --no-links"


def _holds(folder: str, path: str) -> bool:
    """Whether a real path is a folder or lies below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _broken(error: OSError) -> str:
    """Why a link leads nowhere."""
    gone = isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno == ELOOP
    return BROKEN_LINK if gone else reason_of(error)


def _linked_folder(path: Path, root: Path, *, links: bool) -> tuple[str | None, bool]:
    """(why a link beside the class folders is not followed, whether it leads to a folder)."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _broken(error), False
    if not stat.S_ISDIR(mode):
        return None, False
    if not links:
        return _NOT_FOLLOWED, True
    if _holds(os.path.realpath(path), os.path.realpath(root)):
        return f"{CIRCLE}: it leads to a folder that holds it", True
    return None, True


def _entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise WorkloadError(f"the folder {root} cannot be read ({error.strerror}): check its permissions") from error


def holds_images(root: Path) -> bool:
    """Whether image files lie directly in a folder."""
    endings = suffixes()
    return any(
        not entry.name.startswith(".")
        and Path(entry.name).suffix.lower() in endings
        and not (root / entry.name).is_dir()
        for entry in _entries(root)
    )


def _nothing_found(root: Path, skipped: Sequence[Entry]) -> str:
    if skipped:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in skipped[:3])
        return f"{root} has no image that can be used ({len(skipped)} skipped: {reasons})"
    if holds_images(root):
        return f"{root} holds images but no class folders: {UNSORTED}"
    return f"{root} holds no images: it needs one folder for each class, with images ({', '.join(sorted(suffixes()))})"


UNSORTED = (
    "put each image into a folder named after its class, or give their labels: val.txt or LOC_val_solution.csv beside "
    "them, or LABELS=FILE; or ask what needs no classes, TASK=embed (--task embed)"
)
