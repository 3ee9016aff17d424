"""All methods: which one to take at which cost. Bands, and the line that nothing measured lies above."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.facts.matching import dense_gmacs
from analysis.facts.spec import Facts
from analysis.frame import records_of
from analysis.plots import labels
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_reference, share_axis

CAPTION = (
    "Every trial of every method (grey dots), and the Pareto front (thick grey line): trials that no cheaper one "
    "equals. The {count} methods on the front or next to it are drawn in full, with their 95 % bands over images. The "
    "front was chosen after looking, so its height is a little flattering: whether neighbours can be told apart is in "
    "the comparison.{oracle}{below}"
)
ORACLE = " What reads what nobody has beforehand (an oracle) is a grey dot and never on the front."
SHOWN = 5  # methods
NEXT = 0.05  # of all images: a method that loses more to the front, in the mean, is not next to it


def shown(facts: Facts) -> list[str]:
    """The methods drawn: those that lie least below the front, of those that the axis shows at all."""
    bottom = labels.floor(facts.rows)
    seen = facts.candidates if bottom is None else facts.candidates[100 * facts.candidates["top1"] >= bottom]
    # one trial is a point, not a method's curve, as long as there are curves
    several = seen["variant"].value_counts() > 1
    on, away = set(facts.front["variant"]), facts.lacks
    names = [name for name in away if name in several.index and (name in on or away[name] <= NEXT)]
    return sorted(names, key=lambda name: not several[name])[:SHOWN]


@style.themed
def pareto(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against GMACs: all points, the front, and the methods on it, labelled where they stand."""
    rows, edge, looks = facts.rows, facts.front, scene.looks
    figure = style.new_figure(height=5.2)
    axes = figure.subplots()
    axes.plot(rows["gmacs_mean"], 100 * rows["top1"], linestyle="none", marker=".", color="#bdbdbd", gid="all")
    style.settle(axes, rows["gmacs_mean"], 100 * rows["top1"], map(style.setting, records_of(rows)))
    axes.step(
        [*edge["gmacs_mean"], max(dense_gmacs(facts.trials), float(rows["gmacs_mean"].max()))],
        [*(100 * edge["top1"]), 100 * float(edge["top1"].iloc[-1])],
        where="post",
        color="#9a9a9a",
        linewidth=4,
        alpha=0.45,
        zorder=1.2,
        gid="front",
    )
    names = shown(facts)
    if len({style.look_of(name, looks).colour for name in names}) < len(names):  # names are told by colour alone here
        looks = {name: style.look(slot) for slot, name in enumerate(names)}
    for name in names:
        part = rows[rows["variant"] == name].sort_values("gmacs_mean", kind="stable")
        look = style.look_of(name, looks)
        bounds = 100 * part["top1_low"], 100 * part["top1_high"]
        axes.fill_between(part["gmacs_mean"], *bounds, color=look.colour, alpha=0.16, linewidth=0, label="_band")
        axes.plot(part["gmacs_mean"], 100 * part["top1"], label=name, **look.line())
    draw_reference(axes, facts)
    axes.set(xlabel=style.GMACS, ylabel=style.TOP1)
    labels.end_axis(axes, facts)
    share_axis(axes, facts)
    style.put_title(figure, title, scene.subtitle)
    others = Line2D([], [], linestyle="none", marker=".", color="#bdbdbd", label="other trials")
    line = Line2D([], [], color="#9a9a9a", linewidth=4, alpha=0.45, label="front")
    band = style.band_handle("95 % interval over images")
    axes.set_ylim(axes.get_ylim())
    labels.beside(figure, axes, names, looks)
    style.put_legend(figure, [band, line, others, style.dense_handle()])
    return style.finish(figure)


PLOT = Plot(
    pareto,
    "{title}: the Pareto front",
    lambda facts, scene: CAPTION.format(
        count=len(shown(facts)),
        oracle=ORACLE if len(facts.candidates) < len(facts.rows) else "",
        below=labels.below(facts),
    ),
    suffix="_pareto",
    needs=lambda facts: len(facts.series) > 1,
)
