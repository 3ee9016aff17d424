"""What became of everything that was found in a data set: used, left out by a limit, or skipped, and nothing unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ablations.records.image_counts import Counts, ImageCounts
from ablations.workloads.problems import kind_of

_LISTED = 1000  # notes named one by one; the counts hold them all

Entry = tuple[str, str]  # (file, what is said of it)


@dataclass(frozen=True)
class Account:
    """Images are ``found``; each is ``used``, ``left_out`` or skipped, and ``found`` is the sum of the three."""

    found: int
    used: int
    left_out: int = 0  # by a limit
    notes: tuple[Entry, ...] = ()  # (file, note) of images that are unusual and read all the same
    empty_classes: tuple[str, ...] = ()  # class folders without an image that can be used
    ignored: int = 0  # files that do not call themselves images
    links: int = 0  # of the images found, those that are links or lie behind one
    label_file: str = ""  # the file that labels them, where folders do not
    lines: tuple[Entry, ...] = ()  # (file:line, what is wrong with it) of lines that are not used

    def as_data(self, skipped: Sequence[Entry]) -> dict[str, Any]:
        """As ``run.json`` keeps it; ``skipped``: (file, reason) of what was found and cannot be used."""
        assert self.found == self.used + self.left_out + len(skipped), "every image found is accounted for"
        return ImageCounts(
            found=self.found,
            used=self.used,
            left_out=self.left_out,
            skipped=counted(skipped),
            noted=counted(self.notes),
            noted_files=self.notes[:_LISTED],
            empty_classes=self.empty_classes,
            ignored=self.ignored,
            links=self.links,
            label_file=self.label_file,
            lines=counted(self.lines),
            lines_listed=self.lines[:_LISTED],
        ).as_data()


def counted(entries: Iterable[Entry]) -> Counts:
    """How many there are of each kind, the most frequent first."""
    return tuple(Counter(kind_of(what) for _, what in entries).most_common())
