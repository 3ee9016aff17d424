"""The whole analysis of one output folder: figures, tables, and one self-contained page that explains
them.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis import findings, plots, published, style, tables
from analysis.comparison import Finding
from analysis.frame import Results, Setting
from analysis.plots import Drawn, Sample, Scene

log = logging.getLogger(__name__)

TITLES = {  # of the project's own specs, in the order in which a reader meets them
    "score_functions": "Score functions",
    "stage_placement": "Stage placement",
    "k_values": "Effect of K",
    "class_token": "Dropping the class token",
    "evit_stacking": "Stacking on EViT",
    "methods": "All methods",
}
QUESTIONS = {
    "score_functions": "By which score should tokens be chosen?",
    "k_values": "What does K cost, and what does it buy?",
    "stage_placement": "In which blocks should tokens be reduced?",
    "class_token": "Must the class token be kept?",
    "evit_stacking": "Does adaptive sampling on top of EViT pay?",
    "methods": "Which method leads at which cost?",
}
PNG_DPI = 160


@dataclass(frozen=True)
class Written:
    """What an analysis produced: the report, the files beside it, and what it had to leave out."""

    report: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    skipped_specs: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """One spec in the report."""

    name: str
    anchor: str
    title: str
    question: str
    about: str
    findings: list[Finding]
    figures: list[dict[str, str]]
    table: pd.DataFrame
    published: pd.DataFrame | None
    note: str
    failed: int


@dataclass(frozen=True)
class Part:
    """One setting in the report: its sections and the figures that belong to all of them."""

    heading: str
    cautions: list[str]
    limits: list[str]
    sections: list[Section]
    shared: list[dict[str, str]]
    shared_findings: list[Finding] = field(default_factory=list)


def write_analysis(results: Results) -> Written:
    """Write figures/, tables/ and report.html into the folder the results came from."""
    folders = {name: results.folder / name for name in ("figures", "tables")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    settings = results.settings()
    looks = style.assign_looks(results.finished, order=["methods"])
    files: dict[str, list[Path]] = {"figures": [], "tables": []}
    parts = []
    for setting in settings:
        prefix = f"{setting.slug}-" if len(settings) > 1 else ""  # one setting, the usual case: plain file names
        parts.append(_part(results, setting, looks, prefix, folders, files))
    skipped = tuple(name for name in results.specs if name not in set(results.finished["spec"]))
    for name in skipped:
        log.warning("spec %s has no finished trial: no figure and no table", name)
    page = results.folder / "report.html"
    page.write_text(render(results, parts, skipped), encoding="utf-8")
    return Written(page, tuple(files["figures"]), tuple(files["tables"]), skipped)


def _part(
    results: Results,
    setting: Setting,
    looks: Mapping[str, style.Look],
    prefix: str,
    folders: Mapping[str, Path],
    files: dict[str, list[Path]],
) -> Part:
    """Figures, tables and findings of one setting."""
    trials = results.of(setting)
    data = results.run.get("data")  # only the folder's own name: where it lies is nobody's business
    name = Path(data).name if isinstance(data, str) and setting.workload == "imagefolder" else ""
    subtitle = style.describe(setting, trials, data=name)
    scene = Scene(results.images, looks, subtitle, read_samples(results.folder / "samples"))
    sections = []
    known = [name for name in TITLES if name in results.specs]
    for spec in [*known, *(name for name in results.specs if name not in known)]:
        rows = results.of(setting, spec)
        if rows.empty:
            continue
        about = results.about_specs.get(spec, {})
        title = str(about.get("title") or TITLES.get(spec) or spec.replace("_", " "))
        drawn = plots.spec_figures(spec, title, rows, scene)
        table = tables.measured(rows, results.images)
        printed, note = published.published_rows(spec, setting), published.published_note(spec)
        files["tables"] += tables.write(
            folders["tables"],
            f"{prefix}{_safe(spec)}",
            title=title,
            subtitle=subtitle,
            ours=table,
            published=printed,
            note=note,
        )
        failed = int((results.failed["spec"] == spec).sum())
        sections.append(
            Section(
                spec,
                f"{prefix}{_safe(spec)}",
                title,
                str(about.get("question") or QUESTIONS.get(spec, "")),
                str(about.get("caption") or about.get("description") or ""),
                findings.answers(spec, rows, results.images),
                [_embed(one, prefix, folders["figures"], files["figures"]) for one in drawn],
                tables.display(table),
                tables.display_published(printed) if len(printed) else None,
                note,
                failed,
            )
        )
    shared = [_embed(one, prefix, folders["figures"], files["figures"]) for one in plots.shared_figures(trials, scene)]
    adapts = findings.adaptivity(plots.overview(trials), results.images)
    heading = subtitle.split("\n")[0]
    return Part(
        heading,
        style.caution(setting),
        findings.limits(setting, trials, results.images),
        sections,
        shared,
        adapts,
    )


def render(results: Results, parts: list[Part], skipped: tuple[str, ...]) -> str:
    """The report as one HTML text. Everything that comes from files is escaped by the template engine."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    trials, run = results.trials, results.run
    return environment.get_template("report.html.j2").render(
        parts=parts,
        skipped_specs=skipped,
        failed=results.failed.to_dict("records"),
        images_skipped=results.skipped_images,
        trials=trials.sort_values(["spec", "variant", "x", "key"]).to_dict("records"),
        finished=len(results.finished),
        versions=_versions(trials, run),
        command=_command(run.get("command")),
        devices=sorted({device for device in trials["device"] if device}),
        seconds=float(trials["seconds"].sum()),
        created=max(trials["created"], default=""),
        notes={"ours": tables.OUR_NOTE, "published": tables.PUBLISHED_NOTE},
    )


def save_figure(drawn: Drawn, folder: Path, name: str) -> tuple[list[Path], str]:
    """Write a figure as PNG and SVG, the same bytes for the same data; returns the files and the SVG text."""
    with style.theme():
        png, svg = folder / f"{name}.png", folder / f"{name}.svg"
        drawn.figure.savefig(png, dpi=PNG_DPI, metadata={"Title": drawn.title})
        buffer = io.StringIO()
        drawn.figure.savefig(buffer, format="svg", metadata={"Title": drawn.title, "Date": None})
        svg.write_text(buffer.getvalue(), encoding="utf-8")
    return [png, svg], buffer.getvalue()


def _embed(drawn: Drawn, prefix: str, folder: Path, files: list[Path]) -> dict[str, str]:
    """Save a figure and return what the page needs of it. An image element isolates the figure's own ids from
    the page's.
    """
    name = f"{prefix}{_safe(drawn.name)}"
    paths, svg = save_figure(drawn, folder, name)
    files += paths
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
    width, height = (round(96 * inches) for inches in _size(drawn.figure))
    return {
        "name": name,
        "title": drawn.title,
        "caption": drawn.caption,
        "source": source,
        "width": str(width),
        "height": str(height),
    }


def read_samples(folder: Path) -> list[Sample]:
    """The thumbnails of a run; [] where there are none. One that cannot be read is left out."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        entries, grid = index["images"], (int(index["grid"][0]), int(index["grid"][1]))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s/index.json cannot be used (%s): no sheet of sample images", folder, error)
        return []
    found = []
    for entry in entries:
        try:
            path = folder / Path(str(entry["file"])).name  # a name, never a path out of the folder
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            found.append(Sample(str(entry["image"]), int(entry["row"]), pixels, grid))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("sample %s cannot be used (%s)", entry, error)
    return found


def _safe(name: str) -> str:
    """A spec's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in name) or "unnamed"


def _size(figure: Figure) -> tuple[float, float]:
    width, height = figure.get_size_inches()
    return float(width), float(height)


def _versions(trials: pd.DataFrame, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions recorded by the trials and by the run, each name with every value seen."""
    seen: dict[str, set[str]] = {}
    sources = [run.get("versions"), *dict.fromkeys(trials["versions"])]
    for source in sources:
        try:
            values = json.loads(source) if isinstance(source, str) and source else source
        except ValueError:
            values = {"recorded": source}
        for name, value in (values or {}).items() if isinstance(values, Mapping) else ():
            seen.setdefault(str(name), set()).add(str(value))
    return [(name, ", ".join(sorted(values))) for name, values in sorted(seen.items())]


def _command(command: object) -> str:
    return " ".join(map(str, command)) if isinstance(command, list | tuple) else str(command or "")
