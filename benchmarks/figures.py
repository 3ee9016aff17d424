"""The figures. They need matplotlib, which the measurements do not: where it is absent, a message says so."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which the colour-blind can tell apart
_COLOURS = {
    "dense": "#000000", "top-K": "#0072B2", "random": "#999999", "EViT": "#009E73", "ToMe": "#E69F00", "ATS": "#D55E00",
}  # fmt: skip
_MARKERS = {"packed": "o", "padded": "s", "masked": "D", "reference": "^"}


def _matplotlib() -> Any | None:
    """matplotlib, if there is one: even where a notebook left a backend in MPLBACKEND that this Python lacks, and where
    its user's file of settings is no text.
    """
    if "matplotlib" in sys.modules and sys.modules["matplotlib"] is not None:
        return sys.modules["matplotlib"]
    backend, own = os.environ.pop("MPLBACKEND", None), os.environ.get("MATPLOTLIBRC")
    try:
        import matplotlib as mpl
    except ImportError:
        log.warning("no figure: matplotlib is not installed (pip install matplotlib draws it from the next run on)")
        return None
    except UnicodeDecodeError:  # of the file of settings: nothing but defaults is drawn under
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        os.environ["MATPLOTLIBRC"] = os.devnull
        import matplotlib as mpl
    finally:
        _restore(MPLBACKEND=backend, MATPLOTLIBRC=own)
    if backend:
        with suppress(ValueError):
            mpl.rcParams["backend"] = backend
    return mpl


def _restore(**environment: str | None) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _defaults(mpl: Any) -> Iterator[None]:
    """matplotlib's own settings; before and after, whatever its user has."""
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)  # defaults whose names are about to change
        mpl.rcParams.update({k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")})
        yield


def _drawn(draw: Callable[[Any], None], file: Path, size: tuple[float, float]) -> Path | None:
    """A figure without pyplot, drawn under matplotlib's own settings and written; None without matplotlib."""
    mpl = _matplotlib()
    if mpl is None:
        return None
    with _defaults(mpl):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, dpi=150, backend="agg")
    return file


def _family(variant: str) -> str:
    return next((family for family in _COLOURS if variant.startswith(family)), "dense")


def speed_figure(rows: Rows, title: str, file: Path) -> Path | None:
    """Speed-up against the GMACs ratio, one panel a batch size: on the diagonal, time follows cost."""
    batches = sorted({row["batch"] for row in rows})
    return _drawn(lambda figure: _speed(figure, rows, batches, title), file, (4.6 * len(batches), 4.4))


def _speed(figure: Any, rows: Rows, batches: Sequence[int], title: str) -> None:
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)
    measured = [row for row in rows if row["speedup"] is not None and row["kind"] != "dense"]
    most = 1.1 * max([1.2, *(max(row["gmacs_ratio"], row["speedup_high"]) for row in measured)])
    for ax, batch in zip(axes[0], batches, strict=True):
        ax.plot([1, most], [1, most], color="0.6", linewidth=1, zorder=1)
        ax.axhline(1, color="0.85", linewidth=1, zorder=0)
        for row in measured:
            if row["batch"] != batch:
                continue
            colour, filled = _COLOURS[_family(row["variant"])], row["kind"] == "packed"
            bars = [[row["speedup"] - row["speedup_low"]], [row["speedup_high"] - row["speedup"]]]
            ax.errorbar(
                row["gmacs_ratio"], row["speedup"], yerr=bars, color=colour, marker=_MARKERS[row["kind"]],
                markersize=6, markerfacecolor=colour if filled else "white", elinewidth=1,
                linestyle="none", zorder=3 if filled else 2,
            )  # fmt: skip
        ax.set(title=f"batch {batch}", xlabel="GMACs ratio (dense / reduced)", xlim=(0.95, most))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("measured speed-up")
    _legend(axes[0][-1], measured)
    figure.suptitle(title, fontsize="medium")


def _legend(ax: Any, rows: Rows) -> None:
    from matplotlib.lines import Line2D

    families = [family for family in _COLOURS if any(_family(row["variant"]) == family for row in rows)]
    handles = [Line2D([], [], color=_COLOURS[name], marker="o", linestyle="none", label=name) for name in families]
    for kind in ("padded", "masked", "reference"):
        if any(row["kind"] == kind for row in rows):
            handles.append(
                Line2D(
                    [], [], color="0.3", marker=_MARKERS[kind], markerfacecolor="white", linestyle="none", label=kind
                )
            )
    handles.append(Line2D([], [], color="0.6", label="time follows cost"))
    ax.legend(handles=handles, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def scaling_figure(points: Rows, title: str, file: Path) -> Path | None:
    """Time, memory and the deciding's share against the number of tokens (above) and against the batch (below)."""
    return _drawn(lambda figure: _scaling(figure, points, title), file, (12, 7))


def _scaling(figure: Any, points: Rows, title: str) -> None:
    axes = figure.subplots(2, 3)
    columns = (("milliseconds", "ms an image"), ("peak_mib", "peak memory, MiB"), ("deciding", "share of deciding"))
    for line, along, label in ((0, "tokens", "patch tokens"), (1, "batch", "batch")):
        chosen = [point for point in points if point["series"] == along and point["error"] is None]
        for ax, (column, name) in zip(axes[line], columns, strict=True):
            for variant in dict.fromkeys(point["variant"] for point in chosen):
                own = [p for p in chosen if p["variant"] == variant and p[column] is not None]
                if own:
                    ax.plot(
                        [p[along] for p in own], [p[column] for p in own], marker="o", markersize=4, label=variant,
                        color=_COLOURS[_family(variant)],
                    )  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set(xlabel=label, ylabel=name)
            if column != "deciding":
                ax.set_yscale("log")
            else:
                ax.set_ylim(0, max([0.2, *(1.1 * (p[column] or 0) for p in chosen)]))
                ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            _whole_ticks(ax, sorted({point[along] for point in chosen}))
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")


def _whole_ticks(ax: Any, values: Sequence[int]) -> None:
    ax.set_xticks(values, [str(value) for value in values])
    ax.minorticks_off()


def still_figure(
    panels: Mapping[tuple[str, float], Mapping[str, Sequence[float]]],
    thresholds: Sequence[float],
    published: float,
    file: Path,
) -> Path | None:
    """The share of patches that go against the threshold, one panel a way to read clips, one line a folder of frames.

    ``panels``: (title, the most that can go) -> name of a folder -> shares, one for each threshold.
    """
    return _drawn(lambda figure: _still(figure, panels, thresholds, published), file, (4.3 * len(panels) + 1.6, 4.6))


def _still(
    figure: Any,
    panels: Mapping[tuple[str, float], Mapping[str, Sequence[float]]],
    thresholds: Sequence[float],
    published: float,
) -> None:
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    styles = [
        (colour, dashes) for dashes in ("-", (0, (4, 1.5)), (0, (1, 1))) for colour in list(_COLOURS.values())[1:]
    ]
    for ax, ((title, most), lines) in zip(axes, panels.items(), strict=True):
        for (colour, dashes), (name, shares) in zip(styles, lines.items(), strict=False):
            percent = [100 * share for share in shares]
            ax.plot(thresholds, percent, color=colour, linestyle=dashes, linewidth=1.4, label=name)
        ax.axhline(100 * most, color="0.75", linewidth=1, zorder=0)
        ax.annotate("all but the first tubelets", (thresholds[0], 100 * most), (0, 3), textcoords="offset points",
                    fontsize="x-small", color="0.45")  # fmt: skip
        ax.axvline(published, color="0.75", linewidth=1, zorder=0)
        ax.annotate(f"published, {published:g}", (published, 98), (3, 0), textcoords="offset points",
                    fontsize="x-small", color="0.45")  # fmt: skip
        ax.set(title=title, xscale="log", xlabel="threshold on normalised pixels", ylim=(0, 104))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.title.set_fontsize("small")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("patches dropped by rlt (%)")
    axes[-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
