"""What became of the images of a run: how many were found, used and skipped, and why, as its record counts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ablations.records.image_counts import IMAGES_ACCOUNT, ImageCounts

_NAMED = 20  # empty classes named one by one


@dataclass(frozen=True)
class ImagesAccount(ImageCounts):
    """The counts of a run, ready to be told."""

    calibrating: int = 0  # of those used, the images that settings are sought on and that no result counts

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
    data = run.get(IMAGES_ACCOUNT)
    if not isinstance(data, Mapping):
        return None
    try:
        return ImagesAccount.from_data(data, calibrating=int(run.get("calibration_images") or 0))
    except (KeyError, TypeError, ValueError):
        return None
