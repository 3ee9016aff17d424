"""Does the clock agree with the count? (Table A.1 of the ATS paper) Measured speed-up beside the ratio of GMACs."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import published, style
from analysis.facts.spec import Facts
from analysis.plots.base import Plot, Scene

CAPTION = (
    "Left: measured speed-up over the dense model (medians and quartiles of ratios timed side by side) against the "
    "ratio of multiply-adds; on the diagonal the clock gives what the count promises. The hollow star is in print: ATS "
    "on DeiT-S, {fast:g} against {slow:g} images/s at {cost} of {dense} GFLOPs, on another device. Right: the "
    "same speed-ups against the batch size; a dash marks the ratio of multiply-adds at each. Trials timed alone on "
    "their device only: {device}."
)


def in_print() -> tuple[float, float]:
    """Ratio of GFLOPs and speed-up of ATS (Table A.1: DeiT-S, RTX 6000, finetuned)."""
    dense, ats = (published.printed("Table A.1", method) for method in ("", "ATS"))
    return dense.gflops / ats.gflops, ats.images_per_second / dense.images_per_second


@style.themed
def runtime(facts: Facts, scene: Scene, title: str) -> Figure:
    """Speed-up against the ratio of GMACs, and against the batch size."""
    rows, looks, known = facts.timed, scene.looks, in_print()
    figure = style.new_figure(height=4.6)
    against, batches = figure.subplots(1, 2)
    names = list(dict.fromkeys(rows["variant"]))
    for name in names:
        part = rows[rows["variant"] == name].sort_values(["ratio", "at_batch"], kind="stable")
        look = style.look_of(name, looks)
        low = (part["faster"] - part["speedup_low"]).clip(lower=0).fillna(0)
        high = (part["speedup_high"] - part["faster"]).clip(lower=0).fillna(0)
        line = look.line()
        against.errorbar(part["ratio"], part["faster"], yerr=[low, high], elinewidth=1, capsize=2, label=name,
                         **(line | {"linestyle": "none"}))  # fmt: skip
        for _, same in part.groupby("reducer", sort=False):
            same = same.sort_values("at_batch", kind="stable")
            batches.plot(same["at_batch"], same["faster"], label=name, **line)
            batches.plot(same["at_batch"], same["ratio"], color=look.colour, marker="_", markersize=11,
                         linestyle="none", markeredgewidth=1.6, gid="ratio")  # fmt: skip
    top = float(np.nanmax([rows["ratio"].max(), rows["faster"].max(), known[0]])) * 1.08
    against.plot([1, top], [1, top], color=style.DENSE_COLOUR, linewidth=1, linestyle="--", gid="diagonal")
    against.plot(*[[value] for value in known], marker="*", markersize=13, color="#444444", markerfacecolor="white",
                 linestyle="none", gid="published")  # fmt: skip
    against.set(xlabel="dense GMACs / GMACs", ylabel="measured speed-up", xlim=(None, top))
    sizes = sorted(rows["at_batch"].dropna().unique())
    if sizes:
        if len(sizes) > 1:
            batches.set_xscale("log", base=2)
        batches.set_xticks(sizes, [f"{size:g}" for size in sizes])
        batches.minorticks_off()
    batches.axhline(1, color=style.DENSE_COLOUR, linewidth=1, linestyle="--")
    batches.set(xlabel="batch size", ylabel="measured speed-up")
    style.put_title(figure, title, scene.subtitle)
    print_handle = Line2D([], [], marker="*", markersize=12, color="#444444", markerfacecolor="white", linestyle="none",
                          label="in print (ATS, DeiT-S)")  # fmt: skip
    dash = Line2D([], [], marker="_", markersize=11, color="#666666", linestyle="none", label="ratio of GMACs")
    bars = [style.interval_handle("quartiles of the ratios")] if rows["speedup_low"].notna().any() else []
    diagonal = Line2D([], [], color=style.DENSE_COLOUR, linewidth=1, linestyle="--", label="as the count promises")
    series = [style.handle(name, looks) for name in names]
    style.put_legend(figure, [*series, *bars, print_handle, dash, diagonal])
    return style.finish(figure)


def caption(facts: Facts, scene: Scene) -> str:
    devices = sorted(set(facts.timed["device"]) - {""})
    dense, ats = (published.printed("Table A.1", method) for method in ("", "ATS"))
    rates = {"fast": ats.images_per_second, "slow": dense.images_per_second, "cost": ats.gflops, "dense": dense.gflops}
    return CAPTION.format(**rates, device=", ".join(devices) or "device not recorded")


PLOT = Plot(
    runtime, "{title}: the clock against the count", caption, suffix="_speed", needs=lambda facts: not facts.timed.empty
)
