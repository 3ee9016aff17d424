"""Does a second reducer on top of EViT pay? (Table A.5 of the ATS paper)"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis import style
from analysis.facts.spec import Facts
from analysis.plots import labels
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_curves, legend

CAPTION = (
    "Left: top-1 accuracy against multiply-adds as executed, with 95 % intervals. Right: each stack "
    "against {base} with the same budget: what it saves, and what it costs or brings in points of top-1, "
    "with the paired 95 % interval over the same images. A stack pays where the curve on the left lies "
    "above that of {base} at the same cost; saving alone is also to be had with a smaller budget."
)


@style.themed
def stacking(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against GMACs, and the change each stack makes to its base with the same budget."""
    figure = style.new_figure(height=4.6)
    accuracy, change = figure.subplots(1, 2)
    names = draw_curves(accuracy, facts, looks=scene.looks)
    found = facts.gains
    for name in dict.fromkeys(gain.variant for gain in found):
        part = sorted((gain for gain in found if gain.variant == name), key=lambda gain: gain.saved)
        y = [100 * gain.difference for gain in part]
        pairs = [gain.paired for gain in part]
        low = [max(0.0, v - 100 * p.low) if p else np.nan for v, p in zip(y, pairs, strict=True)]
        high = [max(0.0, 100 * p.high - v) if p else np.nan for v, p in zip(y, pairs, strict=True)]
        change.errorbar(
            [100 * gain.saved for gain in part],
            y,
            yerr=[low, high],
            elinewidth=1,
            capsize=2,
            label=name,
            **style.look_of(name, scene.looks).line(),
        )
    change.axhline(0, color=style.DENSE_COLOUR, linewidth=1)
    base = style.label(facts.base or "the base").replace("\n", " ")
    change.set(xlabel=f"GMACs saved against {base},\nsame budget (%)", ylabel="change in top-1 (points)")
    style.put_title(figure, title, scene.subtitle)
    style.put_legend(figure, legend(names, scene.looks, facts))
    return style.finish(figure)


PLOT = Plot(
    stacking,
    "{title}: what the stack changes",
    lambda facts, scene: CAPTION.format(base=facts.base) + labels.below(facts),
    suffix="_gain",
    needs=lambda facts: bool(facts.gains),
)
