"""How a person wants a folder of images to be read: where its labels come from, and whether links are followed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ablations.records.files import user_path

ORDER = "order"  # the sorted folders are the head's classes, in its order
INDEX = "index"  # the folders are named by their index in the head
_RULES = (ORDER, INDEX)


@dataclass(frozen=True)
class Reading:
    """``labels``: None to find out, "order", "index", or a file with a label for each image. Plain values: workers are
    told of it.
    """

    labels: str | None = None
    links: bool = True  # links are followed wherever they lead; False: only those to files inside the folder

    @property
    def rule(self) -> str | None:
        """The rule for the names of folders that was asked for, if any."""
        return self.labels if self.labels in _RULES else None

    @property
    def file(self) -> Path | None:
        """The file of labels that was named, if any."""
        return None if self.labels is None or self.labels in _RULES else user_path(self.labels)


AS_USUAL = Reading()
