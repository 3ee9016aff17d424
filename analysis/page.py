"""The report's page: figures written and embedded, everything rendered into one self-contained HTML text."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from ablations.records import names
from analysis import style, tables
from analysis.account import read_account
from analysis.features import FeatureTable
from analysis.frame import Results, records_of
from analysis.plots import Drawn, Sample

log = logging.getLogger(__name__)

PNG_DPI = 160
ABSOLUTE = re.compile(r"(?<![\w./~-])(?:/[^\s'\"/]+){2,}/?")  # a path from the root, two folders or more


def environment() -> jinja2.Environment:
    """Where templates are found; what they are given is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(
    results: Results,
    parts: Sequence[object],
    skipped: tuple[str, ...],
    others: Sequence[str] = (),
    features: Sequence[FeatureTable] = (),
) -> str:
    """The report as one HTML text. Everything that comes from files is escaped by the template engine."""
    trials, run = results.trials, results.run
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            parts=parts,
            features=features,
            skipped_specs=skipped,
            others=others,
            failed=records_of(results.failed),
            images_skipped=results.skipped_images,
            account=read_account(run),
            trials=records_of(trials.sort_values(["spec", "variant", "x", "key"])),
            finished=len(results.finished) + len(results.features),
            versions=_versions(trials, run),
            command=_command(run.get("command")),
            devices=sorted({device for device in trials["device"] if device}),
            seconds=float(trials["seconds"].sum()),
            created=max(trials["created"], default=""),
            notes={"ours": tables.OUR_NOTE, "published": tables.PUBLISHED_NOTE},
            profile=read_profile(results.folder / names.PROFILE),
            short=tables.SHORT,
            known={str(key)[: tables.SHORT] for key in trials["key"]},
        )
    )


def save_figure(drawn: Drawn, folder: Path, name: str) -> tuple[list[Path], str]:
    """Write a figure as PNG and SVG, the same bytes for the same data; returns the files and the SVG text."""
    with style.theme():
        _settle(drawn.figure)
        png, svg = folder / f"{name}.png", folder / f"{name}.svg"
        drawn.figure.savefig(png, dpi=PNG_DPI, backend="agg", metadata={"Title": drawn.title})
        buffer = io.StringIO()
        drawn.figure.savefig(buffer, format="svg", backend="svg", metadata={"Title": drawn.title, "Date": None})
    text = with_settings(buffer.getvalue(), drawn.figure)
    svg.write_text(text, encoding="utf-8")
    return [png, svg], text


def settings_of(figure: Figure) -> list[dict[str, Any]]:
    """Where on a laid out figure its points are, in pixels of 1/96 inch from the top left, and what each stands for."""
    found = []
    height = float(figure.get_figheight())
    for axes in figure.axes:
        for line in axes.lines:
            if isinstance(line, style.Settings):
                places = axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()])) / figure.dpi
                inside = axes.get_window_extent().padded(1).transformed(figure.dpi_scale_trans.inverted())
                found += [
                    {"x": round(96 * x, 1), "y": round(96 * (height - y), 1), "text": text}
                    for (x, y), text in zip(places.tolist(), line.texts, strict=True)
                    if inside.contains(x, y)
                ]
    return found


def with_settings(svg: str, figure: Figure) -> str:
    """The text of a figure with a title for each of its points."""
    circles = "".join(
        f'<circle cx="{0.75 * one["x"]:.1f}" cy="{0.75 * one["y"]:.1f}" r="5" fill-opacity="0">'
        f"<title>{html.escape(one['text'])}</title></circle>\n"
        for one in settings_of(figure)
    )
    return svg.replace("</svg>", f'<g id="settings">\n{circles}</g>\n</svg>') if circles else svg


def _settle(figure: Figure) -> None:
    """Lay a figure out once and for all. The solver's last digits differ from run to run, and with them the names of
    clip paths: rounded, the same data give the same bytes.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position(original=True).bounds, 6).tolist())


def embed(drawn: Drawn, prefix: str, folders: Mapping[str, Path], files: dict[str, list[Path]]) -> dict[str, Any]:
    """Save a figure, and its numbers where no table has them, and return what the page needs of it. An image element
    isolates the figure's own ids from the page's.
    """
    name = f"{prefix}{safe(drawn.name)}"
    paths, svg = save_figure(drawn, folders[names.FIGURES], name)
    files[names.FIGURES] += paths
    if drawn.data is not None:
        path = folders[names.TABLES] / f"{name}.csv"
        path.write_text(drawn.data.to_csv(index=False), encoding="utf-8")
        files[names.TABLES].append(path)
    points = settings_of(drawn.figure)
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
    width, height = (round(96 * inches) for inches in _size(drawn.figure))
    return {
        "name": name,
        "title": drawn.title,
        "caption": drawn.caption,
        "source": source,
        "width": str(width),
        "height": str(height),
        "points": points,
        "numbers": f"{names.TABLES}/{name}.csv" if drawn.data is not None else "",
    }


def read_samples(folder: Path) -> list[Sample]:
    """The thumbnails of a run; [] where there are none. One that cannot be read is left out."""
    try:
        index = json.loads((folder / names.INDEX).read_text(encoding="utf-8"))
        entries, grid = index["images"], (int(index["grid"][0]), int(index["grid"][1]))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s cannot be used (%s): no sheet of sample images", folder / names.INDEX, error)
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


def read_profile(path: Path) -> dict[str, Any] | None:
    """Where the run's time went, as the run recorded it: wall clock and parts; None where it did not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [
            {"what": str(part["what"]), "seconds": float(part["seconds"]), "share": float(part["share"])}
            for part in found["parts"]
        ]
        return {
            "wall": float(found["wall_seconds"]),
            "workers": int(found.get("workers", 1)),
            "trials": int(found.get("trials", 0)),
            "parts": parts,
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used (%s): the report does without it", path, error)
        return None


def safe(name: str) -> str:
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
    """The command of the run, folders by their own names: where they lie on a machine is nobody's business."""
    text = " ".join(map(str, command)) if isinstance(command, list | tuple) else str(command or "")
    return ABSOLUTE.sub(lambda found: f"…/{Path(found.group()).name}", text)
