"""Keep the class token or sample it like any other (Figure A.4 of the ATS paper)."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis import style
from analysis.facts.spec import Facts
from analysis.plots import labels
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_curves, legend

CAPTION = (
    "Left: top-1 accuracy against multiply-adds as executed, with 95 % intervals. Right: the share of "
    "images in which the class token did not survive; there the head reads the mean of the surviving "
    "tokens."
)


@style.themed
def class_token(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against GMACs, and the share of images that lost their class token at that cost."""
    rows, looks = facts.rows, scene.looks
    figure = style.new_figure(height=4.3)
    accuracy, dropped = figure.subplots(1, 2)
    names = draw_curves(accuracy, facts, looks=looks)
    for name in names:
        part = rows[(rows["variant"] == name) & rows["class_kept"].notna()].sort_values("gmacs_mean", kind="stable")
        if len(part):
            dropped.plot(
                part["gmacs_mean"],
                100 * (1 - part["class_kept"]),
                label=name,
                clip_on=False,
                **style.look_of(name, looks).line(),
            )
    dropped.set(xlabel=style.GMACS, ylabel="class token lost (% of images)", ylim=(0, None))
    if dropped.get_ylim()[1] < 1:
        dropped.set_ylim(0, 1)
    if (rows["class_kept"].dropna() == 1).all():  # an empty panel must say that it is no mistake
        dropped.text(0.5, 0.5, "lost in no image", transform=dropped.transAxes, ha="center", color=style.GREY)
    dropped.set_xlim(accuracy.get_xlim())
    style.put_title(figure, title, scene.subtitle)
    style.put_legend(figure, legend(names, looks, facts))
    return style.finish(figure)


PLOT = Plot(
    class_token,
    "{title}: accuracy, and how often it was dropped",
    lambda facts, scene: CAPTION + labels.below(facts),
    suffix="_dropped",
    needs=lambda facts: bool(facts.rows["class_kept"].notna().any()),
)
