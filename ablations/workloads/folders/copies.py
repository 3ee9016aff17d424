"""Files that are there twice: they would be counted twice, and under two labels one of them is surely wrong.

Files are told apart by size, then by their last bytes, and only what still agrees is read whole: of a large data set
that is next to nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from ablations.workloads.problems import CONTRADICTION, COPY

_TAIL = 4096  # bytes at the end: there compressed images differ, while many begin alike

Entry = tuple[str, int, Path]  # id, label, file


def find_copies(entries: Sequence[Entry]) -> dict[str, str]:
    """Id -> reason, for each file that must not count because another one holds the same bytes.

    Within a class the first by id stays. Under two labels none does: one label is wrong, and nothing says which.
    """
    alike: Iterable[list[Entry]] = [sorted(entries, key=lambda entry: entry[0])]
    for told_apart_by in (_size, _tail, _whole):
        alike = [group for larger in alike for group in _groups(larger, told_apart_by)]
    return {name: reason for group in alike for name, reason in _reasons(group)}


def _groups(entries: Iterable[Entry], tell: Callable[[Path], Hashable]) -> list[list[Entry]]:
    """Those that agree with at least one other. A file that cannot be read agrees with none: loading it says why."""
    groups: dict[Hashable, list[Entry]] = defaultdict(list)
    for entry in entries:
        try:
            groups[tell(entry[2])].append(entry)
        except OSError:
            continue
    return [group for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        raise OSError(f"{path} is empty and no copy of anything")
    return size


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return hashlib.sha256(file.read(_TAIL)).digest()


def _whole(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _reasons(group: Sequence[Entry]) -> list[tuple[str, str]]:
    first, *others = group
    if len({label for _, label, _ in group}) == 1:
        return [(name, f"{COPY}: the same file as {first[0]}") for name, _, _ in others]
    reasons = []
    for name, label, _ in group:
        other = next(name for name, other_label, _ in group if other_label != label)
        reasons.append((name, f"{CONTRADICTION}: {other} holds the same bytes, and one of the labels is wrong"))
    return reasons
