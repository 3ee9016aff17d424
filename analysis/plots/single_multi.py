"""One stage or many (Figure 4c of the ATS paper): accuracy against cost, with the saving the paper claims."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import published, style
from analysis.facts.spec import Facts
from analysis.plots import labels
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_curves, put_names, share_axis

CAPTION = (
    "Top-1 accuracy against multiply-adds as executed, with 95 % intervals over images. The dotted line is the cost at "
    "which the ATS paper keeps almost all of DeiT-S's accuracy: {saved:g} % below the dense model (finetuned, "
    "multi-stage)."
)


def saved() -> float:
    """Percent of DeiT-S's GFLOPs "while accuracy is almost kept" (ATS, Figure 4)."""
    return published.number("Figure 4", "ATS", "reduced by ", " %")


@style.themed
def single_multi(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against GMACs with the published saving marked."""
    figure = style.new_figure()
    axes = figure.subplots()
    names = draw_curves(axes, facts, looks=scene.looks)
    axes.axvline((1 - saved() / 100) * facts.dense, color="#555555", linestyle=":", linewidth=1.4, gid="published")
    share_axis(axes, facts)
    style.put_title(figure, title, scene.subtitle)
    line = Line2D([], [], color="#555555", linestyle=":", linewidth=1.4, label=f"{saved():g} % saved (published)")
    put_names(figure, axes, names, scene, facts, line)
    return style.finish(figure)


PLOT = Plot(
    single_multi,
    "{title}: accuracy against cost",
    lambda facts, scene: CAPTION.format(saved=saved()) + labels.below(facts),
    needs=lambda facts: True,
)
