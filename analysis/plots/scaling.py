"""The same reduction in models of several sizes (Figure 4a of the ATS paper)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from analysis import style
from analysis.facts.matching import against_dense
from analysis.facts.spec import Facts
from analysis.frame import records_of, rows_of
from analysis.plots import tradeoff
from analysis.plots.base import Plot, Scene

CAPTION = (
    "Left: top-1 accuracy against multiply-adds as executed (logarithmic), one colour a model; stars are the models "
    "without reduction, the dashed line joins them. A reduced larger model pays where its curve lies above that line. "
    "Right: what each model loses against its own dense accuracy, in points, with paired 95 % intervals, against the "
    "share of its cost that is left."
)


@style.themed
def scaling(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against cost over models, and the loss of each against its own dense accuracy."""
    figure = style.new_figure(height=4.5)
    accuracy, loss = figure.subplots(1, 2)
    names = list(facts.models)
    series = [(m, str(v)) for m, own in facts.models.items() for v in own.series]
    variants = list(dict.fromkeys(variant for _, variant in series))
    looks = {f"{m} | {v}": style.look_for(names.index(m), variants.index(v)) for m, v in series}
    stars = []
    for model, own in facts.models.items():
        dense = own.dense
        for variant, part in own.rows.groupby("variant", sort=False):
            part = part.sort_values("gmacs_mean", kind="stable")
            name = f"{model} | {variant}"
            tradeoff.draw_intervals(accuracy, part["gmacs_mean"], part, name=name, looks=looks)
            tests = [against_dense(row) for row in records_of(part)]
            known = [
                (100 * row.gmacs_mean / dense, test) for row, test in zip(rows_of(part), tests, strict=True) if test
            ]
            if known:
                y = [100 * test.difference for _, test in known]
                bars = [
                    [100 * (t.difference - t.low) for _, t in known],
                    [100 * (t.high - t.difference) for _, t in known],
                ]
                loss.errorbar(
                    [x for x, _ in known], y, yerr=bars, elinewidth=1, capsize=2, label=name, **looks[name].line()
                )
        if not np.isnan(own.dense_top1):
            stars.append((dense, 100 * own.dense_top1, names.index(model)))
    for at, top, slot in stars:
        accuracy.plot([at], [top], marker="*", markersize=13, color=style.look(slot).colour, markeredgecolor="#222222",
                      markeredgewidth=0.6, linestyle="none", gid="dense", zorder=6)  # fmt: skip
    accuracy.plot([x for x, *_ in stars], [y for _, y, _ in stars], color=style.DENSE_COLOUR, linestyle="--",
                  linewidth=1, zorder=1, gid="dense-line")  # fmt: skip
    accuracy.set_xscale("log")
    accuracy.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    accuracy.xaxis.set_major_formatter(ScalarFormatter())
    accuracy.xaxis.set_minor_formatter(NullFormatter())
    accuracy.set(xlabel=style.GMACS, ylabel=style.TOP1)
    loss.axhline(0, color=style.DENSE_COLOUR, linewidth=1)
    loss.set(xlabel="cost (% of its own dense model)", ylabel="top-1 against its own dense (points)")
    style.put_title(figure, title, scene.subtitle.replace(scene.model, ", ".join(names), 1))
    one = len(variants) == 1
    handles = [
        style.handle(m if one else f"{m}: {v}", {m if one else f"{m}: {v}": looks[f"{m} | {v}"]}) for m, v in series
    ]
    star = Line2D([], [], marker="*", markersize=12, color="#888888", linestyle="--", linewidth=1, label="dense models")
    style.put_legend(figure, [*handles, style.interval_handle(), star])
    return style.finish(figure)


PLOT = Plot(
    scaling,
    "{title}: one reduction, several models",
    lambda facts, scene: CAPTION,
    needs=lambda facts: len(facts.models) > 1,
    otherwise=tradeoff.PLOT,
)
