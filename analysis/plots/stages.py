"""How many tokens images keep at each stage (Figure 6 of the ATS paper): a histogram for each reducing block."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis import style
from analysis.plots import panels
from analysis.plots.samples import stages as chosen_blocks

CAPTION = (
    "Tokens leaving each reducing block (of more than nine, nine of them), prefix included: how many images keep how "
    "many. {name}, {cost} GMACs on average. The vertical line is the mean over images.{split}"
)
SPLIT = " Blue: the third of the images with least clutter; orange: the third with most."
PLAIN, BUSY, ALL = style.COLOURS[0], style.COLOURS[1], "#6d7680"
MAX_STAGES = 9  # panels


def counts(table: pd.DataFrame) -> np.ndarray:
    """(images, blocks + 1) tokens entering each block and leaving the last."""
    return np.stack(table["tokens"].to_list()).astype(float)


def thirds(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray] | None:
    """The images with least and with most clutter, as masks; None where clutter is not known."""
    if "clutter" not in table or not table["clutter"].notna().all() or table["clutter"].nunique() < 2:
        return None
    clutter = table["clutter"].to_numpy(dtype=float)
    low, high = np.quantile(clutter, [1 / 3, 2 / 3])
    return (clutter <= low), (clutter >= high if high > low else clutter > low)


@style.themed
def stages(row: Mapping[str, object], table: pd.DataFrame, *, title: str, subtitle: str) -> Figure:
    """One panel a reducing block of the trial ``row``, all on one scale."""
    blocks = chosen_blocks(row["blocks"], MAX_STAGES)  # type: ignore[arg-type]
    tokens, split = counts(table), thirds(table)
    columns = 3 if len(blocks) > 2 else len(blocks)
    figure = panels.new_figure(len(blocks), columns=columns, extra=1.6)
    grid = panels.subplots(figure, len(blocks), columns=columns)
    leaving = tokens[:, [block + 1 for block in blocks]]
    low, high = leaving.min(), leaving.max()
    width = max(1, round((high - low) / 32))
    bins = np.arange(low - 0.5, high + 0.5 + width, width)
    groups = [(ALL, np.ones(len(tokens), dtype=bool))] if split is None else [(PLAIN, split[0]), (BUSY, split[1])]
    for axes, block, values in zip(grid, blocks, leaving.T, strict=True):
        for colour, part in groups:
            weights = np.full(int(part.sum()), 100 / max(1, int(part.sum())))
            axes.hist(
                values[part], bins=bins.tolist(), weights=weights, color=colour, alpha=0.55, label=f"block {block}"
            )
        axes.axvline(values.mean(), color="#222222", linewidth=1.2, gid="mean")
        panels.name_panel(axes, f"after block {block}: mean {values.mean():.0f}", width=30)
    panels.share_limits(grid, "tokens, prefix included", "images (%)", figure)
    style.put_title(figure, title, subtitle)
    if split is not None:
        style.put_legend(figure, [Patch(color=PLAIN, alpha=0.55, label="least clutter (third of the images)"),
                                  Patch(color=BUSY, alpha=0.55, label="most clutter (third)")])  # fmt: skip
    return style.finish(figure)
