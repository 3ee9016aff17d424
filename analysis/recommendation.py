"""The page of a recommendation: ``OUT/recommend.html`` from what a search left (``recommend.json`` and the results of
its candidates). Nothing is computed anew.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import UndefinedError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ablations.records import names
from ablations.records.parquet import read_parquet
from ablations.records.storage import Disk
from analysis import page, style
from analysis.facts.kept import packed
from analysis.frame import AnalysisError
from analysis.plots import Drawn, Sample
from analysis.plots.samples import draw_kept, find_row, stages

FORMAT = 1  # of the record
SMALL = 8.5  # points
FOUND, SINGLE, CONTROL = "#0a5c8f", "#9a3412", style.GREY
_KINDS = (("finalists", FOUND), ("comparator", SINGLE), ("others", SINGLE))


@dataclass(frozen=True)
class Found:
    """What a search came to, as its record says it."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def goals(self) -> list[Mapping[str, Any]]:
        return list(self.about["goals"])

    @property
    def metric(self) -> str:
        return str(self.about["metric"])


def read_found(folder: Path) -> Found:
    """What a search left in a folder.

    Raises:
        AnalysisError: there is none, or its record is damaged.
    """
    path = folder / names.RECOMMENDATION
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        goals = about["goals"]
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r:.40}, and this is read: {FORMAT}")
        if not goals:
            raise ValueError("it tells of no goal")
        for goal in goals:
            rows = [goal["recommended"], goal["comparator"], *goal["finalists"], *goal["others"]]
            if not all(isinstance(row["value"], float) for row in rows) or not goal["sentences"]:
                raise ValueError("a goal is not as a search writes it")
    except FileNotFoundError as error:
        raise AnalysisError(f"{path} is not there: `sievit recommend --out {folder}` makes it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnalysisError(f"{path} cannot be used ({error}): run `sievit recommend` again") from error
    return Found(folder, about)


def write_recommendation(folder: Path) -> Path:
    """Write ``recommend.html`` beside the record it was made from; figures go below ``figures``.

    Raises:
        AnalysisError: as of ``read_found``, or the record lacks something that is drawn.
    """
    found = read_found(folder)
    try:
        return _written(found)
    except (LookupError, TypeError, ValueError, UndefinedError) as error:
        path = folder / names.RECOMMENDATION
        raise AnalysisError(f"{path} cannot be drawn ({error!r:.200}): run `sievit recommend` again") from error


def _written(found: Found) -> Path:
    folder = found.folder
    folders = {name: folder / name for name in (names.FIGURES, names.TABLES)}
    for one in folders.values():
        one.mkdir(exist_ok=True)
    files: dict[str, list[Path]] = {names.FIGURES: [], names.TABLES: []}
    parts = [
        {
            "goal": goal,
            "title": title_of(goal),
            "rows": [*table_rows(goal, found)],
            "timed": [row for row in _entries(goal) if row.get("timed")],
            "figures": [page.embed(drawn, "recommend-", folders, files) for drawn in figures_of(goal, found)],
            "file": f"{names.RECOMMENDED}/{goal['goal']['name']}.yaml",
        }
        for goal in found.goals
    ]
    front = [page.embed(drawn, "recommend-", folders, files) for drawn in front_of(found)]
    text = (
        page.environment()
        .get_template("recommendation.html.j2")
        .render(about=found.about, parts=parts, front=front, python=in_python(found), percent=_percent)
    )
    path = folder / names.RECOMMENDATION_PAGE
    path.write_text(text, encoding="utf-8")
    return path


# --- words and tables -------------------------------------------------------------------------------------------------


def title_of(goal: Mapping[str, Any]) -> str:
    """What was asked for."""
    asked = goal["goal"]
    if asked["speed"] is not None:
        return f"{asked['speed']:g} times as fast as the dense model"
    return f"At {100 * asked['share']:g} % of the dense model's cost"


def table_rows(goal: Mapping[str, Any], found: Found) -> Iterator[dict[str, str]]:
    """Everything that was looked at on the confirmation images, the best first, and the dense model."""
    for kind, row in sorted(_labelled(goal), key=lambda one: -one[1]["value"]):
        difference = row.get("difference")
        yield {
            "kind": kind,
            "label": row["label"],
            "share": f"{100 * row['share']:.1f}",
            "search": _percent(row["search"]),
            "value": f"{_percent(row['value'])} [{_percent(row['low'])}, {_percent(row['high'])}]",
            "difference": "" if difference is None else (
                f"{100 * difference['mean']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}], "
                f"p = {difference['adjusted']:.2g}"
            ),
        }  # fmt: skip
    dense = found.about["dense"]
    yield {"kind": "", "label": "dense model", "share": "100", "search": _percent(dense["search"]),
           "value": _percent(dense["value"]), "difference": ""}  # fmt: skip


def _labelled(goal: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    chosen = goal["recommended"]["key"]
    for row in _entries(goal):
        single = row["key"] == goal["comparator"]["key"] or row in goal["others"]
        kind = "control" if row["control"] else "single method" if single else "found"
        yield (f"{kind}, recommended" if row["key"] == chosen else kind), row


def _entries(goal: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*goal["finalists"], goal["comparator"], *goal["others"]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def in_python(found: Found) -> str:
    """How what was found is used, in six lines."""
    goal, about = found.goals[0]["goal"]["name"], found.about
    trained, host = found.goals[0].get("weights") or {}, about.get("host") or {}
    name, weights = about["model"], about["weights"]
    if about["source"] == "timm" and weights == "hub" and "?" not in name:
        opened = f'import timm\nmodel = timm.create_model("{name}", pretrained=True).eval()'
    else:  # as the search opened it: a size of its own, weights from a file, another library
        given = {"file": '"FILE.safetensors"', "random": '"random"'}.get(weights, "None")
        more = ", headless=True" if about["task"] == "embed" else ""
        note = "  # the file that was given; None for a model's folder" if weights == "file" else ""
        opened = (
            "from ablations.workloads import open_model\n"
            f'model = open_model("{name}", weights={given}, workload_name="{about["workload"]}"{more}).model{note}'
        )
    if "model" in trained:
        file = f"{names.RECOMMENDED}/{trained['model']}"
        opened += f'\nimport safetensors.torch\nmodel.load_state_dict(safetensors.torch.load_file("{file}"))'
    driven = f", host={json.dumps(host)}" if host else ""
    return (
        f"import reducers\n{opened}\n"
        f'placement = reducers.load("{names.RECOMMENDED}/{goal}.yaml", model)\n'
        f"fast = reducers.reduce_tokens(model, placement{driven})\n"
        f"answers = fast(images)  # as model(images), at the cost of {goal}"
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def figures_of(goal: Mapping[str, Any], found: Found) -> Iterator[Drawn]:
    """What was confirmed, and what survives of six images."""
    title = f"Confirmed: {title_of(goal)[0].lower()}{title_of(goal)[1:]}"
    subtitle = f"{found.about['model']}, {goal['confirmation_images']:,} images that the search never saw"
    yield Drawn(
        f"{goal['goal']['name']}-confirmed", title,
        f"Filled: {found.metric} on the confirmation images with its 95 % interval; hollow: on the search images, by "
        "which it was chosen. The dashed line is the dense model on the confirmation images.",
        confirmed(goal, found, title=title, subtitle=subtitle),
    )  # fmt: skip
    pictures = page.read_samples(found.folder / names.CANDIDATES / names.SAMPLES)
    tables = _images(goal, found)
    if pictures and tables:
        title = "What is left of six images"
        yield Drawn(
            f"{goal['goal']['name']}-kept", title,
            "Patches that still have a token of their own after a reducing block, and how many; the others are greyed "
            "(merged or dropped).",
            survivors(goal, tables, pictures, title=title, subtitle=subtitle),
        )  # fmt: skip


@style.themed
def confirmed(goal: Mapping[str, Any], found: Found, *, title: str, subtitle: str) -> Figure:
    """A row for each placement that was confirmed, the best above."""
    rows = sorted(_labelled(goal), key=lambda one: one[1]["value"])
    figure = style.new_figure(height=1.5 + 0.36 * len(rows))
    axes = figure.subplots()
    for place, (kind, row) in enumerate(rows):
        colour = CONTROL if row["control"] else FOUND if kind.startswith("found") else SINGLE
        axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour, linewidth=2.2, zorder=2)
        axes.plot(100 * row["value"], place, "o", color=colour, markersize=7, zorder=3)
        axes.plot(
            100 * row["search"], place, "o", markerfacecolor="white", markeredgecolor=colour, markersize=5.5, zorder=2
        )
    axes.axvline(100 * found.about["dense"]["value"], color=style.DENSE_COLOUR, linestyle="--", linewidth=1.1)
    axes.set_yticks(range(len(rows)), [_wrapped(row["label"], chosen="recommended" in kind) for kind, row in rows])
    axes.set_xlabel(f"{found.metric} (%)")
    axes.grid(axis="y", visible=False)
    style.put_title(figure, title, subtitle)
    handles = [_dot(FOUND, "found by the search"), _dot(SINGLE, "single published method")]
    if any(row["control"] for _, row in rows):
        handles.append(_dot(CONTROL, "control"))
    style.put_legend(figure, handles)
    return style.finish(figure)


def _dot(colour: str, text: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker="o", color=colour, label=text)


def _wrapped(label: str, *, chosen: bool) -> str:
    return "\n".join(textwrap.wrap(f"➤ {label}" if chosen else label, 44))


def front_of(found: Found) -> Iterator[Drawn]:
    """What was found at several costs against every single method; nothing where one cost was asked."""
    goals = [goal for goal in found.goals if goal["goal"]["speed"] is None]
    if len(goals) < 2:
        return
    title = "What was found, against every single method"
    subtitle = f"{found.about['model']}, {found.goals[0]['search_images']:,} search images"
    yield Drawn(
        "front", title,
        "Thick: the best that the search found at each cost; thin: single published methods, the best named. All on "
        "the search images, by which they were chosen: what was confirmed stands above.",
        front(goals, found, title=title, subtitle=subtitle),
    )  # fmt: skip


@style.themed
def front(goals: Sequence[Mapping[str, Any]], found: Found, *, title: str, subtitle: str) -> Figure:
    """Search accuracy against cost: a line for each single method, and the best candidate of each cost."""
    figure = style.new_figure()
    axes: Axes = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for goal in goals:
        for row in goal["singles"]:
            curves.setdefault(row["label"], []).append((100 * goal["goal"]["share"], 100 * row["search"]))
    best = sorted(curves, key=lambda name: -max(value for _, value in curves[name]))[:3]
    for name, points in curves.items():
        named = name in best
        axes.plot(*zip(*sorted(points), strict=True), color=SINGLE if named else "#c9c9c9", linewidth=1.2, marker=".",
                  zorder=2 if named else 1)  # fmt: skip
        if named:
            axes.annotate(name, max(points), xytext=(5, 0), textcoords="offset points", fontsize=SMALL, color=SINGLE)
    points = sorted(
        (100 * goal["goal"]["share"], 100 * max(row["search"] for row in (*goal["complete"], *goal["singles"])))
        for goal in goals
    )
    axes.plot(*zip(*points, strict=True), color=FOUND, linewidth=2.6, marker="o", label="best found", zorder=3)
    axes.axhline(100 * found.about["dense"]["search"], color=style.DENSE_COLOUR, linestyle="--", linewidth=1.1)
    axes.set(xlabel="share of the dense model's multiply-adds (%)", ylabel=f"{found.metric} (%)")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.18 * (high - low))
    style.put_title(figure, title, subtitle)
    style.put_legend(
        figure, [_dot(FOUND, "best found"), _dot(SINGLE, "best single methods"), _dot("#c9c9c9", "others")]
    )
    return style.finish(figure)


def _images(goal: Mapping[str, Any], found: Found) -> dict[str, pd.DataFrame]:
    """The per-image tables of what is recommended and of the best single method, by key; those that can be read."""
    store, tables = Disk(found.folder / names.CANDIDATES), {}
    for row in (goal["recommended"], goal["comparator"]):
        try:
            table = read_parquet(store, names.images_file(row["key"]))
        except (OSError, ValueError):
            continue
        tables[row["key"]] = table.select(["image", "correct", "kept"]).to_pandas()
    return tables


@style.themed
def survivors(
    goal: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    pictures: Sequence[Sample],
    *,
    title: str,
    subtitle: str,
) -> Figure:
    """A row an image: the input, then what each placement leaves of it at three of its blocks."""
    shown = [row for row in (goal["recommended"], goal["comparator"]) if row["key"] in tables]
    shown = list({row["key"]: row for row in shown}.values())
    columns = [(row, block) for row in shown for block in stages(blocks_of(row["stages"]))]
    figure = style.new_figure(height=1.02 * len(pictures) + 1.4)
    grid = figure.subplots(len(pictures), 1 + len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, sample in zip(grid, pictures, strict=True):
        line[0].imshow(sample.pixels)
        for axes, (row, block) in zip(line[1:], columns, strict=True):
            bits, at = packed(tables, row["key"]), find_row(tables[row["key"]], sample)
            if bits is not None and at is not None:
                last = block == stages(blocks_of(row["stages"]))[-1]
                right = tables[row["key"]]["correct"].iloc[at] if last else None
                draw_kept(axes, sample, bits[at, block], right=None if right is None or pd.isna(right) else bool(right))
    grid[0, 0].set_title("input", fontsize=SMALL)
    letters = dict(zip((row["key"] for row in shown), "AB", strict=False))
    for axes, (row, block) in zip(grid[0, 1:], columns, strict=True):
        axes.set_title(f"{letters[row['key']]}: block {block}", fontsize=SMALL)
    told = [f"{letters[row['key']]}: {row['label']}" for row in shown]
    style.put_title(figure, title, "\n".join([subtitle, *told]))
    return figure


def blocks_of(placed: Sequence[Mapping[str, Any]]) -> list[int]:
    """The blocks where something acts, ascending."""
    return sorted({int(block) for stage in placed for block in stage["at"]})
