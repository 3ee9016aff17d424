"""What became of the images of a run, as ``run.json`` has it under ``images_account``: written and read here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

IMAGES_ACCOUNT = "images_account"

Counts = tuple[tuple[str, int], ...]  # kind of problem, and how many have it
Entries = tuple[tuple[str, str], ...]  # (file, what is said of it)


@dataclass(frozen=True)
class ImageCounts:
    """Of ``found`` images each is used, left out or skipped."""

    found: int
    used: int
    left_out: int = 0  # by a limit
    skipped: Counts = ()
    noted: Counts = ()  # what is unusual about images that are used all the same
    noted_files: Entries = ()  # the first of them
    empty_classes: tuple[str, ...] = ()  # without an image that can be used
    ignored: int = 0  # files that do not call themselves images
    links: int = 0  # of those found, images that are links or lie behind one
    label_file: str = ""  # where folders do not say the classes
    lines: Counts = ()  # of that file, those that are not used
    lines_listed: Entries = ()  # the first of them

    def as_data(self) -> dict[str, Any]:
        """As ``run.json`` keeps it."""
        return {
            "found": self.found,
            "used": self.used,
            "left_out_by_limit": self.left_out,
            "skipped": dict(self.skipped),
            "noted": dict(self.noted),
            "noted_files": list(map(list, self.noted_files)),
            "empty_classes": list(self.empty_classes),
            "ignored_files": self.ignored,
            "links": self.links,
            "label_file": self.label_file,
            "label_lines": dict(self.lines),
            "label_lines_listed": list(map(list, self.lines_listed)),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], **more: Any) -> Self:
        """The counts a run recorded, those of an earlier version too; ``more``: fields of a subclass.

        Raises:
            KeyError, TypeError, ValueError: it is no such record.
        """
        return cls(
            found=int(data["found"]),
            used=int(data["used"]),
            left_out=int(data.get("left_out_by_limit", 0)),
            skipped=_counts(data.get("skipped")),
            noted=_counts(data.get("noted")),
            noted_files=_entries(data.get("noted_files")),
            empty_classes=tuple(map(str, data.get("empty_classes") or ())),
            ignored=int(data.get("ignored_files", 0)),
            links=int(data.get("links", 0)),
            label_file=str(data.get("label_file") or ""),
            lines=_counts(data.get("label_lines")),
            lines_listed=_entries(data.get("label_lines_listed")),
            **more,
        )


def _counts(value: object) -> Counts:
    return tuple((str(kind), int(count)) for kind, count in value.items()) if isinstance(value, Mapping) else ()


def _entries(value: object) -> Entries:
    listed = value if isinstance(value, list) else []
    return tuple((str(each[0]), str(each[1])) for each in listed if isinstance(each, list) and len(each) == 2)
