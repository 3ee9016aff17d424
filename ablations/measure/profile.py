"""Where the time of a run went: a clock for each part, always on, shown by ``sievit run --profile``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

WORKER_PARTS = {
    "worker_start": "workers: opening model and images",
    "images": "images: reading, normalising",
    "finetuning": "finetuning",
    "calibration": "calibration to equal cost",
    "prefix": "shared prefix of several trials",
    "evaluation": "evaluation: forward passes, traced",
    "bookkeeping": "bookkeeping: columns, kept, summaries",
    "writing": "writing results",
    "planning": "planning what to try next (Optuna, and whether it comes near its cost)",
    "hand_over": "workers: waiting for the next trials",
    "idle": "workers: idle, nothing left to do",
}
"""Spent by the workers side by side: a worker's second is 1 / workers of a second of the run."""

DRIVER_PARTS = {
    "imports": "imports",
    "opening": "opening and decoding, model, plan",
    "dense": "the plain model's predictions",
    "ray_start": "start and end of Ray",
    "speed": "speed trials, alone on the machine",
    "records": "records, samples and compaction",
}
"""Spent by the run as a whole, one after the other."""

_REST = "the rest"


class Profile:
    """Seconds by part. Parts do not contain each other, so that their sum is what was spent."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """Account for time measured elsewhere."""
        assert part in WORKER_PARTS or part in DRIVER_PARTS, part
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Account for what the block takes, also when it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - started)

    def merge(self, seconds: Mapping[str, float]) -> None:
        """Add what another process has measured."""
        for part, spent in seconds.items():
            self.add(part, spent)

    def take(self) -> dict[str, float]:
        """What was measured so far; the clocks start again from nought."""
        taken, self.seconds = self.seconds, {}
        return taken


def summary(profile: Profile, *, wall: float, workers: int, trials: int, computations: int) -> dict[str, Any]:
    """The profile of a run as ``profile.json`` holds it.

    ``share`` is of the run's wall clock. The overhead of Ray is what its workers' time went into that a serial loop
    does not know: starting, opening model and images again, handing out, idling.
    """
    found: list[tuple[str, str, float, float]] = []  # part, in words, seconds of processes, seconds of the run
    for names, side_by_side in ((DRIVER_PARTS, 1), (WORKER_PARTS, workers)):
        for part, words in names.items():
            spent = profile.seconds.get(part, 0.0)
            if spent > 0:
                found.append((part, words, spent, spent / side_by_side))
    rest = wall - sum(seconds for *_, seconds in found)
    found.append(("rest", _REST, rest, rest))
    parts = [
        {"part": part, "what": words, "process_seconds": spent, "seconds": seconds, "share": seconds / max(wall, 1e-9)}
        for part, words, spent, seconds in sorted(found, key=lambda entry: -entry[3])
    ]
    lost = ("worker_start", "planning", "hand_over", "idle")
    work = sum(profile.seconds.get(part, 0.0) for part in WORKER_PARTS if part not in lost) / workers
    overhead = sum(profile.seconds.get(part, 0.0) for part in lost) / workers + profile.seconds.get("ray_start", 0.0)
    return {
        "wall_seconds": wall,
        "workers": workers,
        "trials": trials,
        "computations": computations,
        "parts": parts,
        "work_seconds": work,
        "overhead_seconds": overhead,
        "overhead": overhead / work if work > 0 else None,
    }


def profile_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The summary as rows of a table: what, seconds of the run, share."""
    rows = [[part["what"], f"{part['seconds']:.1f}", f"{100 * part['share']:.1f} %"] for part in found["parts"]]
    return [*rows, ["all", f"{found['wall_seconds']:.1f}", "100.0 %"]]


def profile_words(found: Mapping[str, Any]) -> str:
    """How the table is to be read, and what the workers' way of running cost."""
    words = (
        f"{found['computations']} computations for {found['trials']} trials on {found['workers']} "
        f"worker{'s, whose seconds side by side count once' if found['workers'] > 1 else ''}"
    )
    if found["workers"] < 1 or found["overhead"] is None or found["overhead_seconds"] < 0.05:
        return words
    return (
        f"{words}\nstarting Ray and its workers, planning, handing out and idling: "
        f"{found['overhead_seconds']:.1f} s beside {found['work_seconds']:.1f} s of work "
        f"({100 * found['overhead']:.1f} %)"
    )
