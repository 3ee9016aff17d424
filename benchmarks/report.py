"""What is kept of a measurement: a table to read, the same as data, and a figure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
_NUMBERS = re.compile(r"\[[-\d.,e\s]+\]")  # a list of numbers takes one line


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def spread(row: Mapping[str, Any], middle: str, low: str, high: str) -> str:
    """Median and quartiles."""
    return "–" if row[middle] is None else f"{row[middle]:.2f} ({row[low]:.2f}–{row[high]:.2f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table, the first column left and the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines)) + "\n"


def speed_table(rows: Rows) -> str:
    """One table a batch size; the latency at batch 1 stands beside the others."""
    single = {row["variant"]: row for row in rows if row["batch"] == 1}
    parts = []
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch]
        training = {row["training_batch"] for row in own} - {None}
        beside = batch != 1 and bool(single)
        head = ["variant", "GMACs", "GMACs ratio", "images/s", "speed-up (quartiles)", "efficiency", "peak memory"]
        head += [f"training step, batch {next(iter(training))}"] if training else []
        head += ["latency at batch 1, ms (speed-up)"] if beside else []
        lines = []
        for row in own:
            if row["error"] is not None:
                lines.append([row["variant"], f"not measured: {row['error']}", *["–"] * (len(head) - 2)])
                continue
            line = [
                row["variant"],
                _gmacs(row),
                number(row["gmacs_ratio"]),
                number(row["images_per_second"], 1),
            ]
            line.append(spread(row, "speedup", "speedup_low", "speedup_high"))
            alone = row["efficiency_lowest"] is None
            between = "efficiency", "efficiency_lowest", "efficiency_highest"
            line.append(number(row["efficiency"]) if alone else spread(row, *between))
            line.append(
                "–" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f} ({row['peak_mib']:.0f} MiB)"
            )
            if training:
                line.append(spread(row, "training_speedup", "training_low", "training_high"))
            if beside:
                line.append(_latency(single.get(row["variant"])))
            lines.append(line)
        parts.append(f"## Batch {batch}\n\n{table(head, lines)}")
    return "\n".join(parts)


def _gmacs(row: Mapping[str, Any]) -> str:
    """With what folded sizes add to the kernel's products, which costs never hold."""
    more = row.get("folded_gmacs")
    return number(row["gmacs"], 3) + ("" if more is None else f" (fold: + {number(more, 3)})")


def _latency(row: Mapping[str, Any] | None) -> str:
    if row is None or row["milliseconds"] is None:
        return "–"
    return f"{row['milliseconds']:.1f} ({row['speedup']:.2f})"


def scaling_table(points: Rows) -> str:
    """Every point; the deciding's share of the reduced model's own time is in the last column."""
    head = [
        "variant",
        "pixels",
        "tokens",
        "batch",
        "GMACs",
        "ms/image",
        "speed-up",
        "efficiency",
        "peak MiB",
        "peak memory",
    ]
    lines = []
    dense = {(p["pixels"], p["batch"]): p["gmacs"] for p in points if p["variant"] == "dense"}
    for p in points:
        line = [p["variant"], str(p["pixels"]), str(p["tokens"]), str(p["batch"])]
        if p["error"] is not None:
            lines.append([*line, f"not measured: {p['error']}", *["–"] * (len(head) - 4)])
            continue
        efficiency = p["speedup"] / (dense[p["pixels"], p["batch"]] / p["gmacs"])
        line += [number(p["gmacs"], 3), number(p["milliseconds"], 1), number(p["speedup"]), number(efficiency)]
        line += [number(p["peak_mib"], 0), number(p["memory_ratio"])]
        lines.append([*line, "–" if p["deciding"] is None else f"{100 * p['deciding']:.1f} %"])
    return table([*head, "deciding"], lines)


def keep(
    folder: Path, stem: str, *, title: str, notes: Sequence[str], data: Mapping[str, Any], text: str, draw: Draw | None
) -> list[Path]:
    """Write table, data and, where there is something to draw with, the figure; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{stem}.md", folder / f"{stem}.json"]
    if draw is not None:
        figure = draw(folder / f"{stem}.png")
        if figure is not None:
            written.append(figure)
            text += f"\n![{title}]({figure.name})\n"
    said = "\n\n".join(notes)
    written[0].write_text(f"# {title}\n\n{said}\n\n{text}", encoding="utf-8")
    content = {"title": title, "notes": list(notes), **data}
    lines = _NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(content, indent=1, ensure_ascii=False))
    written[1].write_text(f"{lines}\n", encoding="utf-8")
    return written


Draw = Callable[[Path], Path | None]
