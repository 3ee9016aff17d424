"""Labels from a file, for images that lie in no class folders.

Two forms, each with a line for an image: ``NAME LABEL`` (ILSVRC's ``val.txt``), and a ``.csv`` of ``NAME,LABEL …``
(Kaggle's ``LOC_val_solution.csv``, whose objects follow one another: the first names the class). A label is an index of
the head or a WordNet id. Names are looked up among the images that were found, so no line reaches out of the folder.
"""

from __future__ import annotations

import csv
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ablations.workloads.account import Entry, counted
from ablations.workloads.base import WorkloadError
from ablations.workloads.classes import imagenet_indices
from ablations.workloads.problems import BROKEN_LINE, ESCAPE, NO_IMAGE, NO_LABEL, REPEATED, TWO_LABELS

log = logging.getLogger(__name__)

_WORDNET = re.compile(r"n\d{8}")
_LOGGED = 10
_IMAGENET_1K = 1000


class _Line(NamedTuple):
    number: int
    name: str
    label: str  # an index or a WordNet id


@dataclass(frozen=True)
class FileLabels:
    """What a file says of the images that were found."""

    label_of: dict[str, int]  # image id -> class index
    classes: int
    unusable: tuple[Entry, ...]  # (image id, reason) of images without exactly one label
    problems: tuple[Entry, ...]  # (file:line, what is wrong with it)


def read_labels(file: Path, ids: Sequence[str], *, folder: str, head: int | None) -> FileLabels:
    """The label of each image id; ``folder`` is the images' own, which names in the file may begin with.

    Lines that cannot be used are named and counted. A label outside the head is refused: where one is, the numbering
    is another, and every label is wrong.
    """
    problems: list[Entry] = []
    lines = list(_lines(file, problems))
    if not lines:
        raise WorkloadError(
            f"{file} holds no line that can be read as labels: each needs an image's name and its class, an index or a "
            "WordNet id, as `ILSVRC2012_val_00000001.JPEG 65` or, in a .csv, `ILSVRC2012_val_00000001,n01751748 …`"
        )
    indices, classes = _indices(file, lines, head)
    given: dict[str, set[int]] = defaultdict(set)
    known = _Names(ids, folder)
    for line, index in zip(lines, indices, strict=True):
        where = f"{file.name}:{line.number}"
        image = known.find(line.name)
        if image is None:
            leaves = line.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", line.name)
            problems.append((where, f"{ESCAPE if leaves else NO_IMAGE}: {line.name[:100]}"))
        elif index in given[image]:
            problems.append((where, f"{REPEATED}: {line.name[:100]}"))
        else:
            given[image].add(index)
    label_of = {name: next(iter(found)) for name, found in given.items() if len(found) == 1}
    unusable = [_unusable(name, sorted(given.get(name, ())), file) for name in ids if name not in label_of]
    _say(file, problems)
    if not label_of:
        raise WorkloadError(
            f"{file} labels none of the {len(ids)} images that were found (it begins with {lines[0].name!r}, they with "
            f"{min(ids)!r}): give the file that belongs to them"
        )
    return FileLabels(label_of, classes, tuple(unusable), tuple(problems))


def _unusable(name: str, given: list[int], file: Path) -> Entry:
    if given:
        return name, f"{TWO_LABELS}: {file.name} says {' and '.join(map(str, given))}"
    return name, f"{NO_LABEL}: {file.name} does not name it"


def _say(file: Path, problems: Sequence[Entry]) -> None:
    for where, what in problems[:_LOGGED]:
        log.warning("%s: %s", where, what)
    if len(problems) > _LOGGED:
        counts = ", ".join(f"{count} × {kind}" for kind, count in counted(problems))
        log.warning("%s: %d lines are not used (%s)", file, len(problems), counts)


# --- lines ------------------------------------------------------------------------------------------------------------


def _lines(file: Path, problems: list[Entry]) -> Iterator[_Line]:
    """Each line that names an image and a label; those that do not become problems."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text) if file.suffix.lower() == ".csv" else (line.rsplit(None, 1) for line in text)
            for number, row in enumerate(rows, start=1):
                if not any(part.strip() for part in row):
                    continue
                name, label = (row[0].strip(), (row[1].split() or [""])[0]) if len(row) > 1 else ("", "")
                if name and (_WORDNET.fullmatch(label) or _is_index(label)):
                    yield _Line(number, name, label)
                elif number > 1 or not _is_header(row):
                    problems.append((f"{file.name}:{number}", f"{BROKEN_LINE}: {' '.join(row).strip()[:100]}"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{file} is no text of labels ({error}): give val.txt or LOC_val_solution.csv") from error
    except OSError as error:
        raise WorkloadError(f"the labels {file} cannot be read ({error.strerror}): check its permissions") from error


def _is_index(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdecimal() and len(label) < 10


def _is_header(row: Sequence[str]) -> bool:
    """The words above a table: none of them is the name of a file."""
    return len(row) > 1 and all(part.strip() and "." not in part and "/" not in part for part in row)


def _indices(file: Path, lines: Sequence[_Line], head: int | None) -> tuple[list[int], int]:
    """The class index of each line, and the number of classes."""
    known = imagenet_indices(_IMAGENET_1K if head is None else head) or {}
    named = [int(line.label) if _is_index(line.label) else known.get(line.label, -1) for line in lines]
    if head is not None:
        classes = head
    elif any(line.label in known for line in lines):
        classes = len(known)
    else:
        classes = max(named) + 1
    outside = [line for line, index in zip(lines, named, strict=True) if not 0 <= index < classes]
    if outside:
        first = outside[0]
        hint = ""
        if min(named) == 1 and max(named) == classes:
            hint = " They run from 1: subtract one from each, for classes count from 0."
        elif not known and _WORDNET.fullmatch(first.label):
            hint = f" A head of {classes} classes is none of ImageNet's, so WordNet ids mean nothing to it."
        raise WorkloadError(
            f"{file}: {len(outside)} of {len(lines)} labels are outside 0..{classes - 1}, the classes of the model's "
            f"head (the first: line {first.number}, {first.name} has {first.label}).{hint} Correct them, or choose a "
            "model (or WEIGHTS) whose head has these classes"
        )
    return named, classes


class _Names:
    """Images by the names a file may give them: with or without folders, with or without the ending."""

    def __init__(self, ids: Iterable[str], folder: str) -> None:
        self._folder = f"{folder}/"
        self._by_name: dict[str, set[str]] = defaultdict(set)
        for name in ids:
            path = PurePosixPath(name)
            for called in {name, path.name, str(path.with_suffix("")), path.stem}:
                self._by_name[called].add(name)
        self._ids = frozenset(ids)

    def find(self, name: str) -> str | None:
        """The one image that is meant; None where there is none, or more than one."""
        plain = name.replace("\\", "/").removeprefix("./").removeprefix(self._folder)
        if plain in self._ids:
            return plain
        found = self._by_name.get(plain, set())
        return next(iter(found)) if len(found) == 1 else None
