"""What every figure is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.facts.clips import ClipGrid
from analysis.facts.spec import Facts
from analysis.plots.panels import pages
from analysis.style import Look


@dataclass(frozen=True)
class Sample:
    """One thumbnail: which image it is, its pixels, and the grid of patches on it."""

    image: str
    row: int  # of the per-image tables
    pixels: np.ndarray  # (H, W, 3) uint8
    grid: tuple[int, int]  # rows, columns of patches


@dataclass(frozen=True)
class Drawn:
    """A finished figure with what a reader needs beside it; ``data``: the numbers drawn, where no table has them."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame | None = None


@dataclass(frozen=True)
class Scene:
    """What all figures of one setting share."""

    looks: Mapping[str, Look]
    subtitle: str
    pictures: Sequence[Sample] = ()
    model: str = ""
    imagenet: bool = False  # the data and classes of the published tables
    patches: int | None = None  # patches of an image, where the run says it
    count: int = 0  # images
    clip: ClipGrid | None = None  # where these are clips
    page: int = 0  # of a figure whose panels do not fit on one

    def worded(self, drawn: list[Drawn]) -> list[Drawn]:
        """Figures and captions that speak of images; where these are clips, of clips."""
        if self.clip is None:
            return drawn
        for text in (each for one in drawn for each in one.figure.findobj(Text)):
            if "images" in text.get_text():
                text.set_text(text.get_text().replace("images", "clips"))
        return [replace(one, caption=one.caption.replace("images", "clips")) for one in drawn]


def reduces(facts: Facts) -> bool:
    """Whether anything but the plain model was run."""
    return not facts.rows.empty


@dataclass(frozen=True)
class Plot:
    """A figure that a spec may have."""

    draw: Callable[[Facts, Scene, str], Figure]  # under a title
    heading: str  # after ``{title}``, the spec's
    caption: Callable[[Facts, Scene], str]
    suffix: str = ""  # of its files, after the spec's name
    needs: Callable[[Facts], bool] = reduces
    data: Callable[[Facts], pd.DataFrame] | None = None  # the numbers drawn, where no table has them
    panels: Callable[[Facts], int] = lambda facts: 1  # of more than nine the others follow in figures of their own
    otherwise: Plot | None = None  # where the data are not there

    def drawn(self, facts: Facts, title: str, scene: Scene) -> list[Drawn]:
        """The figure, or the one in its stead; [] where the data are there for neither."""
        if not self.needs(facts):
            return [] if self.otherwise is None else self.otherwise.drawn(facts, title, scene)
        heading = self.heading.format(title=title)
        data = None if self.data is None else self.data(facts)
        caption, name, count = self.caption(facts, scene), f"{facts.name}{self.suffix}", pages(self.panels(facts))
        drawn = [Drawn(name, heading, caption, self.draw(facts, scene, heading), data)]
        for page in range(1, count):
            more = f"{heading} ({page + 1} of {count})"
            figure = self.draw(facts, replace(scene, page=page), more)
            drawn.append(Drawn(f"{name}_appendix{page}", more, caption, figure))
        return scene.worded(drawn)
