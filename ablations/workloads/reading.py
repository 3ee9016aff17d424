"""Which images a person wants, and how a folder of them is read: plain values, so that workers can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ablations.records.files import absolute, user_path
from ablations.workloads.preprocess import Resize
from ablations.workloads.videos.sampling import ONE_VIEW, Sampling

ORDER = "order"  # the sorted folders are the head's classes, in its order
INDEX = "index"  # the folders are named by their index in the head
_RULES = (ORDER, INDEX)


@dataclass(frozen=True)
class Reading:
    """``labels``: None to find out, "order", "index", or a file with a label for each image."""

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

    def located(self) -> Reading:
        """With the file's full path."""
        return self if self.file is None else Reading(absolute(self.labels), self.links)


AS_USUAL = Reading()


@dataclass(frozen=True)
class ImageSource:
    """Where images come from, those to evaluate and those to train on, and which of them are taken."""

    name: str = "embedded"  # see ``available_workloads``
    data: str | None = None  # their folder
    train_data: str | None = None  # that of the images to train on, where it is not found beside ``data``
    limit: int | None = None  # a fixed subset of so many, spread over the classes
    strict: bool = False  # refuse images that cannot be used, instead of skipping and reporting them
    download: bool = False  # torchvision and timm may fetch a data set
    resize: Resize = "auto"  # see ``preprocess``
    reading: Reading = AS_USUAL
    sampling: Sampling = ONE_VIEW  # of clips: which frames, and how many views

    def located(self) -> ImageSource:
        """With full paths, for whoever reads them from elsewhere."""
        return dataclasses.replace(
            self, data=absolute(self.data), train_data=absolute(self.train_data), reading=self.reading.located()
        )
