"""What became of the images of a run: how many were found, used and skipped, and why, as its record counts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NAMED = 20  # empty classes named one by one


@dataclass(frozen=True)
class ImagesAccount:
    """The counts of a run, ready to be told."""

    found: int
    used: int
    calibrating: int  # of these, the images that settings are sought on and that no result counts
    left_out: int  # by a limit
    ignored: int  # files that do not call themselves images
    skipped: tuple[tuple[str, int], ...]  # kind of problem and how many images have it
    noted: tuple[tuple[str, int], ...]  # what is unusual about images that are used all the same
    empty_classes: tuple[str, ...]
    links: int = 0  # of those found, images that are links or lie behind one
    label_file: str = ""  # where folders do not say the classes
    lines: tuple[tuple[str, int], ...] = ()  # kind of problem and how many lines of that file have it

    @property
    def summary(self) -> str:
        """One sentence that adds up."""
        skipped = sum(count for _, count in self.skipped)
        calibrate = f" ({self.calibrating} only to calibrate)" if self.calibrating else ""
        parts = [f"{self.used} are used{calibrate}", f"{skipped} skipped"]
        if self.left_out:
            parts.insert(1, f"{self.left_out} left out by the limit")
        ignored = f"; {self.ignored} further files do not call themselves images" if self.ignored else ""
        links = f"; {self.links} of those found are links or lie behind links" if self.links else ""
        return f"Of {self.found} images found, {', '.join(parts[:-1])} and {parts[-1]}{ignored}{links}{self._labels}."

    @property
    def _labels(self) -> str:
        if not self.label_file:
            return ""
        problems = ", ".join(f"{count} × {kind}" for kind, count in self.lines)
        return f"; their labels are those of {self.label_file}" + (f" ({problems})" if problems else "")

    @property
    def empty(self) -> str:
        """Names of the classes without an image that can be used; "" where every class has one."""
        more = len(self.empty_classes) - _NAMED
        return ", ".join(self.empty_classes[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def read_account(run: Mapping[str, Any]) -> ImagesAccount | None:
    """The account a run recorded, or None where it recorded none that can be read."""
    data = run.get("images_account")
    if not isinstance(data, Mapping):
        return None
    try:
        return ImagesAccount(
            found=int(data["found"]),
            used=int(data["used"]),
            calibrating=int(run.get("calibration_images") or 0),
            left_out=int(data.get("left_out_by_limit", 0)),
            ignored=int(data.get("ignored_files", 0)),
            skipped=_counts(data.get("skipped")),
            noted=_counts(data.get("noted")),
            links=int(data.get("links", 0)),
            label_file=str(data.get("label_file") or ""),
            lines=_counts(data.get("label_lines")),
            empty_classes=tuple(map(str, data.get("empty_classes") or ())),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _counts(value: object) -> tuple[tuple[str, int], ...]:
    return tuple((str(kind), int(count)) for kind, count in value.items()) if isinstance(value, Mapping) else ()
