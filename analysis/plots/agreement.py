"""Do methods keep the same patches? Agreement between them at equal cost, beyond what chance would give."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.facts.agreement import square

CAPTION = (
    "Agreement about which patches still have a token of their own after the last block, at {level}: Cohen's kappa, "
    "mean over images. 0 is what two random choices of as many patches would have, 1 the same choice; columns bear the "
    "numbers of the rows; similar methods stand side by side. Of a merged group its heaviest member counts as kept. "
    "Jaccard's index and its value by chance are in the table.{left}"
)
ANNOTATED = 28  # methods up to which the numbers fit into the cells


@style.themed
def agreement(pairs: pd.DataFrame, *, title: str, subtitle: str) -> Figure:
    """Kappa as a heat map: the lower triangle, the names beside it."""
    values = square(pairs)
    names = [_tick(name, i + 1) for i, name in enumerate(values.index)]
    count, lines = len(names), sum(name.count("\n") + 1 for name in names)
    figure = style.new_figure(height=min(8.6, 1.7 + max(0.27 * count, 0.17 * lines)))
    axes = figure.subplots()
    shown = np.ma.masked_array(values.to_numpy(), mask=np.triu(np.ones((count, count), dtype=bool)))
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    small = 8.5 if count <= 12 else 7.5
    # Numbers name the columns: slanted names take more room than the cells, and collide where there are many.
    axes.set_xticks(range(count), [str(i + 1) for i in range(count)], fontsize=small)
    axes.set_yticks(range(count), names, fontsize=small)
    axes.grid(visible=False)
    for i in range(count):
        for j in range(i):
            value = values.to_numpy()[i, j]
            if count <= ANNOTATED and not np.isnan(value):
                colour = "white" if value > 0.55 else "#222222"
                axes.text(
                    j, i, _digits(value), ha="center", va="center", fontsize=min(small, 115 / count), color=colour
                )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Cohen's kappa (0: chance)")
    style.put_title(figure, title, subtitle)
    return style.finish(figure)


def _tick(name: str, number: int) -> str:
    """A row's name and number; a long name goes over two lines, its blocks stay together."""
    held = re.sub(r"\(.*?\)|blocks? [\d, -]+", lambda found: found.group().replace(" ", "\u00a0"), name)
    return "\n".join(_wrap(f"{held.replace('_', ' ')}\u2002{number}", 32))


def _wrap(text: str, width: int) -> list[str]:
    """Lines broken at ordinary spaces alone (``textwrap`` breaks at others too)."""
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}".strip(" ")
        if len(line) <= width or not lines[-1]:
            lines[-1] = line
        else:
            lines.append(word)
    return lines


def _digits(value: float) -> str:
    """Kappa in as little room as two decimals take: ".47", "1.00"."""
    text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text
