"""One measurement in several fresh processes, their pairs pooled.

Where a process's buffers come to lie is settled when it starts and stays so: an allocator that hands pages back and
takes them again does so all the time in one process and hardly in the next (``allocator.py``). One process is one draw
of that, however many rounds it runs; several show what to expect, and how far they lie apart.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.session import how_timed, write_speed
from benchmarks.timing import Quartiles

Row = Mapping[str, Any]


def run(arguments: Sequence[str], out: Path, *, rounds: int, processes: int, say: Callable[[str], None]) -> None:
    """Measure in ``processes`` processes, one after the other, and write one table a scenario.

    ``arguments`` are those of ``python -m benchmarks``. Peak memory and the training step are taken in the first.

    Raises:
        SystemExit: one of the processes failed; it has said why
    """
    with TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(processes)]
        for number, own in enumerate(folders):
            say(f"process {number + 1} of {processes}")
            once = [] if number == 0 else ["--no-memory", "--train-batch", "0"]
            ended = subprocess.run(
                [sys.executable, "-m", "benchmarks", *arguments, *once, "--processes", "1", "--out", str(own)],
                stdout=subprocess.DEVNULL, check=False,
            )  # fmt: skip
            if ended.returncode:
                raise SystemExit(ended.returncode)
        for file in sorted(folders[0].glob("*.json")):
            parts = [json.loads((own / file.name).read_text(encoding="utf-8")) for own in folders]
            first, alone = parts[0], how_timed(rounds)
            write_speed(
                out,
                file.stem,
                title=first["title"],
                notes=[how_timed(rounds, processes) if note == alone else note for note in first["notes"]],
                known=first["machine"],
                rows=pool([part["rows"] for part in parts]),
                profiles=first["profiles"],
                say=say,
            )


def pool(tables: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """One table of several with the same rows: ratios over the pairs of all."""
    return [_together(rows) for rows in zip(*tables, strict=True)]


def _together(rows: Sequence[Row]) -> dict[str, Any]:
    first = dict(rows[0])
    if {(row["variant"], row["batch"]) for row in rows} != {(first["variant"], first["batch"])}:
        raise ValueError("the tables of the processes do not have the same rows")
    failed = next((row["error"] for row in rows if row["error"] is not None), None)
    if failed is not None:
        known = {name: first[name] for name in ("variant", "kind", "batch")}
        return dict.fromkeys(first) | known | {"error": failed}
    times, beside = ([second for row in rows for second in row[name]] for name in ("seconds", "dense_seconds"))
    speed = Quartiles.of([dense / own for dense, own in zip(beside, times, strict=True)])
    middle, own = statistics.median(times), [row["efficiency"] for row in rows]
    return first | {
        "milliseconds": 1e3 * middle, "images_per_second": first["batch"] / middle, "speedup": speed.median,
        "speedup_low": speed.low, "speedup_high": speed.high, "efficiency": speed.median / first["gmacs_ratio"],
        "efficiency_lowest": min(own), "efficiency_highest": max(own), "seconds": times,
        "dense_seconds": beside,
    }  # fmt: skip
