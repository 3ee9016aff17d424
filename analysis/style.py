"""How every figure looks: one theme, one colour and marker a series, one way to title. No figure decides
these itself.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path

from analysis import drawing
from analysis.frame import Setting, reducer_names

GMACS = "GMACs (the papers' GFLOPs)"
TOP1 = "top-1 accuracy (%)"
FEW_IMAGES = 200  # below this a figure says that it cannot rank methods
DENSE = "dense model"
DENSE_COLOUR = "#3a3a3a"
GREY = "#6a6a6a"  # of legend entries that belong to every series
BAR = Path(  # an error bar with its caps, as a marker
    [(-0.3, -1), (0.3, -1), (0, -1), (0, 1), (-0.3, 1), (0.3, 1)],
    [Path.MOVETO, Path.LINETO, Path.MOVETO, Path.LINETO, Path.MOVETO, Path.LINETO],
)
WIDTH = 7.2  # inches: a page's text width; also legible when a phone shows it scaled
# Colour-blind safe (Okabe and Ito's as seaborn tunes them, then Tol's); the pale yellow and pink are
# unreadable on white.
COLOURS = (
    *(sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 4, 9, 3)),
    "#332288",
    "#882255",
    sns.color_palette("colorblind").as_hex()[5],
)
MARKERS = (
    "o",
    "s",
    "^",
    "D",
    "v",
    "P",
    "X",
    "<",
    ">",
    "h",
    "p",
)  # 11: no colour meets its first marker again soon
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
PAIRS, CLUTTERED, MOVING = "digit pairs", "cluttered digits", "moving digits"  # scenes of the embedded workloads
WORKLOADS = {
    "embedded": PAIRS,
    "embedded:v1": CLUTTERED,
    "moving_digits": MOVING,
    "imagefolder": "image folder",
    "clips": "clips",
}
_READ_CLUTTERED = ("digits_vit_small", "digits_vit_tiny")  # their shipped weights read no other scenes

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of a series: any one of the three is enough to tell it from its neighbours."""

    colour: str
    marker: str
    dashes: Any

    def line(self) -> dict[str, Any]:
        """Keyword arguments for ``Axes.plot`` and ``Axes.errorbar``."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dashes,
            "linewidth": 1.6,
            "markersize": 6,
            "markeredgecolor": "white",
            "markeredgewidth": 0.7,
        }


class Settings(Line2D):
    """What each drawn point stands for, a text a point: a page shows it where the point is touched. Draws nothing."""

    def __init__(self, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> None:
        super().__init__(x, y, linestyle="none", marker="", gid="settings")
        self.texts = tuple(texts)


def settle(axes: Axes, x: Iterable[float], y: Iterable[float], texts: Iterable[str]) -> None:
    """Say what the points drawn at these places stand for."""
    axes.add_line(Settings(list(x), list(y), list(texts)))


def setting(row: Mapping[Any, Any]) -> str:
    """A row as a point of a curve stands for it: series, blocks, budget, cost, accuracy."""
    name, placement = str(row["variant"]).replace("_", " "), str(row["placement"])
    budget = row["budget"] or ("" if pd.isna(row["x"]) or not pd.isna(row["target"]) else f"x = {row['x']:g}")
    where = "" if placement in name else placement
    share = "" if pd.isna(row["dense_gmacs"]) else f" ({100 * row['gmacs_mean'] / row['dense_gmacs']:.0f} % of dense)"
    low, high = row["top1_low"], row["top1_high"]
    bounds = "" if pd.isna(low) or pd.isna(high) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    head = ", ".join(part for part in (name, where, str(budget)) if part)
    return f"{head}: {cost(row['gmacs_mean'])} GMACs{share}, top-1 {100 * row['top1']:.1f} %{bounds}"


@contextmanager
def theme() -> Iterator[None]:
    """The settings every figure is made and saved under, none of the user's; these are restored."""
    own = {
        **sns.axes_style("whitegrid"),
        **sns.plotting_context("paper", font_scale=1.15),
        "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
        "grid.color": "#e4e4e4",
        "axes.edgecolor": "#8a8a8a",
        "axes.titlesize": 10.5,
        "figure.titlesize": 11,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "svg.hashsalt": "sievit",
        "figure.dpi": 100,
        # Hinted letters are wider or narrower from one resolution to the next, up to 8 %: what was laid out at one
        # would be cut off in the file that is written at another.
        "text.hinting": "no_hinting",
    }
    with drawing.settings(own):
        yield


def themed(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a figure function under ``theme()``."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with theme():
            return draw(*args, **kwargs)

    return wrapper


def new_figure(*, height: float = 4.6, width: float = WIDTH) -> Figure:
    """A figure that belongs to no window and no global state; its parts are laid out without overlaps."""
    return Figure(figsize=(width, height), layout="constrained")


def assign_looks(trials: pd.DataFrame, *, order: Sequence[str] = ()) -> dict[str, Look]:
    """One look for each series of a whole run: the same series looks the same in every figure.

    Two series that meet in a spec never share a look. Series that never meet share one where they are made of
    the same reducers at the same blocks ("ATS" here, "ATS (block 3)" there). ``order`` names the specs whose
    series choose first.
    """
    trials = trials[~trials["dense"]] if "dense" in trials else trials  # it has a look of its own
    specs = [*order, *(name for name in trials["spec"].unique() if name not in order)]
    series = {spec: list(dict.fromkeys(trials.loc[trials["spec"] == spec, "variant"])) for spec in specs}
    first = trials.drop_duplicates("variant").set_index("variant")
    made = {str(name): _made_of(row) for name, row in first.iterrows()}
    slots: dict[str, int] = {}
    for name in dict.fromkeys(label for spec in specs for label in series[spec]):
        beside = {other for labels in series.values() if name in labels for other in labels}
        met = {slots[other] for other in beside if other in slots}
        kin = [slot for other, slot in slots.items() if made[other] == made[name] and slot not in met]
        slots[name] = kin[0] if kin else next(i for i in range(len(slots) + 1) if i not in met)
    return {name: look(slot) for name, slot in slots.items()}


def _made_of(row: pd.Series) -> tuple[object, ...]:
    """What a series is made of, as far as its look goes; each nameless one is made of something else."""
    names = reducer_names(str(row.get("reducer", "")))
    return (*names, row.get("placement")) if names else (row.name,)


def look(slot: int) -> Look:
    """The look of a slot: colours first, then the same colours with another line and marker."""
    return Look(COLOURS[slot % len(COLOURS)], MARKERS[slot % len(MARKERS)], DASHES[slot // len(COLOURS) % len(DASHES)])


def look_for(colour: int, shape: int) -> Look:
    """A look by two numbers: what shares the first has the same colour, what shares the second the same shape."""
    return Look(COLOURS[colour % len(COLOURS)], MARKERS[shape % len(MARKERS)], DASHES[shape % len(DASHES)])


def look_of(name: str, looks: Mapping[str, Look]) -> Look:
    """The look of a series; of one that was never assigned, a look of its own that depends on its name
    alone.
    """
    return looks[name] if name in looks else look(sum(map(ord, name)) % len(COLOURS))


def cost(gmacs: float) -> str:
    """GMACs as text, three digits that mean something: "0.094", "1.25", "17.6"."""
    return f"{gmacs:.3f}" if gmacs < 1 else f"{gmacs:.2f}" if gmacs < 10 else f"{gmacs:.1f}"


def label(variant: str) -> str:
    """A series as legends and tables write it."""
    return textwrap.fill(variant.replace("_", " "), 34)


def scenes(workload: object, model: object, weights: object) -> str:
    """Which scenes an embedded workload shows; "" for any other. Before the digit pairs, the cluttered digits were
    ``embedded``: where they are meant, the weights tell.
    """
    if workload == "embedded" and model in _READ_CLUTTERED and weights == "embedded":
        return CLUTTERED
    return WORKLOADS[workload] if workload in ("embedded", "embedded:v1", "moving_digits") else ""


def describe(setting: Setting, trials: pd.DataFrame, *, data: str = "") -> str:
    """Workload, model, number of images, trained how: what a title has to say to be honest."""
    scene = scenes(setting.workload, setting.model, setting.weights)
    workload = scene or WORKLOADS.get(setting.workload, setting.workload) + (f" {data}" if data else "")
    tuned = set(trials["finetuned"])
    how = "off the shelf" if tuned <= {False} else "finetuned" if tuned == {True} else "off the shelf and finetuned"
    if setting.weights == "random" and tuned == {True}:
        how = "trained from random weights"
    what = "clips" if setting.workload in ("moving_digits", "clips") else "images"
    text = f"{workload}, {setting.model}, {setting.images:,} {what}, {how}"
    return "\n".join([text, *caution(setting, trials)])


def caution(setting: Setting, trials: pd.DataFrame) -> list[str]:
    """Why a setting's numbers must not be believed; [] where nothing speaks against them."""
    said = []
    if setting.weights == "random" and not trials["finetuned"].all():
        said.append("RANDOM WEIGHTS: this shows that the suite runs, nothing about methods")
    if setting.images < FEW_IMAGES:
        said.append(f"ONLY {setting.images} IMAGES: too few to rank methods")
    return said


def put_title(figure: Figure, title: str, subtitle: str) -> None:
    """Title and honest subtitle at the top left, inside the layout."""
    columns = int(12.2 * figure.get_figwidth())  # characters of this size that fit across
    lines = [line for part in (title, *subtitle.split("\n")) for line in textwrap.wrap(part, columns)]
    figure.suptitle("\n".join(lines), x=0.012, ha="left", linespacing=1.35)


def put_legend(figure: Figure, handles: Iterable[Any], *, columns: int | None = None) -> None:
    """A legend below the axes, where it can hide no data."""
    entries = list(handles)
    if not entries:
        return
    longest = max(max(map(len, str(entry.get_label()).split("\n"))) for entry in entries)
    fits = max(1, int(figure.get_figwidth() * 12 / (longest + 7)))
    across = min(columns or fits, fits, len(entries))
    down = -(-len(entries) // across)
    lines = sum(max(str(e.get_label()).count("\n") + 1 for e in entries[i::down]) for i in range(down))
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, lines - 3))  # a long legend takes nothing from the axes
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=across,
        handlelength=2.6,
        columnspacing=1.4,
    )


def handle(name: str, looks: Mapping[str, Look]) -> Line2D:
    """A legend entry for a series."""
    return Line2D([], [], label=label(name), **look_of(name, looks).line())


def dense_handle(*, star: bool = True) -> Line2D:
    """The plain model's entry; without its star where cost is not on the axis."""
    marker = "*" if star else ""
    return Line2D([], [], color=DENSE_COLOUR, marker=marker, markersize=11, linestyle="--", linewidth=1, label=DENSE)


def interval_handle(text: str = "95 % interval over images") -> Line2D:
    """A legend entry for error bars."""
    return Line2D([], [], color=GREY, marker=BAR, markersize=13, markerfacecolor="none", linestyle="none", label=text)


def seeds_handle() -> Line2D:
    """A legend entry for single seeds beside their mean."""
    look: dict[str, Any] = {"marker": "o", "markersize": 3.4, "markerfacecolor": "none", "markeredgewidth": 0.8}
    return Line2D([], [], color=GREY, linestyle="none", label="single seed", **look)


def cross_handle(text: str = "interpolated between neighbours") -> Line2D:
    """A legend entry for the cross on an interpolated point: a marker with its cross inside."""
    look: dict[str, Any] = {"marker": "$\\otimes$", "markersize": 9, "markeredgewidth": 0.3}
    return Line2D([], [], color=GREY, linestyle="none", label=text, **look)


def band_handle(text: str, *, colour: str = GREY, alpha: float = 0.25) -> Patch:
    """A legend entry for a band."""
    return Patch(facecolor=colour, alpha=alpha, linewidth=0, label=text)


def rule_handle(text: str, dashes: Any) -> Line2D:
    """A legend entry for a thin grey rule."""
    return Line2D([], [], color="#777777", linestyle=dashes, linewidth=1, label=text)


def plain_handle(text: str) -> Line2D:
    """A legend entry for what was left as it is."""
    return Line2D([], [], color="#8d8d8d", marker="x", linestyle=":", label=text)


def draw_dense(axes: Axes, *, gmacs: float | None, value: float) -> None:
    """The plain model: a dashed line at its value and, where its cost is on the axis, a star."""
    axes.axhline(value, color=DENSE_COLOUR, linestyle="--", linewidth=1, zorder=1.5, gid="dense-line")
    if gmacs is not None:
        axes.plot(
            [gmacs],
            [value],
            marker="*",
            markersize=12,
            color=DENSE_COLOUR,
            linestyle="none",
            zorder=5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=DENSE,
        )


def finish(figure: Figure) -> Figure:
    """Remove the frame's top and right sides where no second axis needs them."""
    sns.despine(fig=figure)
    return figure
