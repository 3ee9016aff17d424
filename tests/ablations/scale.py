"""Twenty thousand trials without computing one: a plan, synthetic results, and what each command then costs.

``python -m tests.ablations.scale measure FOLDER [COUNT]`` prints a table of seconds and memory; each row is a process
of its own, as it would be for a person.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from ablations.records.parquet import parquet
from ablations.records.schema import IMAGE_SCHEMA, ROW_SCHEMA
from ablations.run.session import Session, Settings, open_session
from ablations.store.store import Store
from ablations.trial.trial import base_row
from tests.ablations.memory import most_held

COUNT = 20_000
SPECS = 5
LEFT = 10  # not finished
_SCORES = ("class_attention", "value_norm")
_FIRST = 5  # blocks to begin at

SPEC = """\
name: {name}
title: One of {specs} parts of a large grid
base:
  x: K
  vary: {{K: {counts}, first: {blocks}, score: [{scores}]}}
  stages: [{{at: [$first, 9], stack: [{{name: $method, budget: {{count: $K}}, score: $score}}]}}]
arms:
  - {{variant: ATS, set: {{method: ats}}}}
  - {{variant: top-K, set: {{method: topk}}}}
  - {{variant: EViT, set: {{method: evit}}}}
"""


def write_specs(folder: Path, count: int = COUNT) -> list[str]:
    """Specs of at least ``count`` trials in all; their files."""
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-count // (SPECS * 3 * len(_SCORES) * _FIRST))  # values of K, of which there may be any number
    paths = []
    for number in range(SPECS):
        path = folder / f"part_{number}.yaml"
        first = 1 + number * each
        path.write_text(
            SPEC.format(
                name=f"part_{number}", specs=SPECS, counts=list(range(first, first + each)),
                blocks=list(range(_FIRST)), scores=", ".join(_SCORES),
            )
        )  # fmt: skip
        paths.append(str(path))
    return paths


def opened(folder: Path) -> Session:
    """The session of the large plan."""
    specs = tuple(sorted(str(path) for path in (folder / "specs").glob("*.yaml")))
    return open_session(
        Settings(folder / "out", model="digits_vit_tiny", weights="random", limit=10, batch=4, specs=specs)
    )


def fill(folder: Path, count: int = COUNT) -> int:
    """Synthetic results for all trials of the plan but the last; how many trials there are.

    Files are written without waiting for the disk: it is reading that is measured here.
    """
    from ablations.run.record import write_record

    write_specs(folder / "specs", count)
    session = opened(folder)
    trials, store = session.all_trials, session.store
    total = session.target.images
    columns: dict[str, Any] = {name: [None] * total for name in IMAGE_SCHEMA.names}
    columns |= {
        "image": [f"test/{i}" for i in range(total)], "correct": [True] * total, "label": [1] * total,
        "prediction": [1] * total, "gmacs": [0.05] * total, "tokens": [[65] * 13] * total,
        "kept": [[b"\xff" * 8] * 12] * total,
    }  # fmt: skip
    images = parquet(pa.Table.from_pydict(columns, IMAGE_SCHEMA))
    for number, trial in enumerate(trials[:-LEFT]):
        top1 = 0.3 + 0.5 * (number % 97) / 97
        row = {
            **base_row(trial, session.facts), "status": "ok", "top1": top1, "top1_low": top1 - 0.1,
            "top1_high": top1 + 0.1, "top5": 0.9, "agreement": 0.8, "gmacs_mean": 0.02 + number % 31 / 1000,
            "gmacs_std": 0.001, "reference_gmacs_mean": 0.03, "reducer_gmacs_mean": 0.0001, "dense_gmacs": 0.06,
            "tokens": [65.0] * 13, "tokens_std": [0.0] * 13, "coverage": 0.5, "class_kept": 1.0, "seconds": 1.5,
            "device": "cpu (1 thread)", "versions": '{"torch": "2"}', "dense_top1": 0.8, "attempts": 1,
        }  # fmt: skip
        (store.out / "trials" / f"{trial.key}.parquet").write_bytes(parquet(pa.Table.from_pylist([row], ROW_SCHEMA)))
        (store.out / "images" / f"{trial.key}.parquet").write_bytes(images)
    write_record(session, command=["python", "-m", "ablations", "run"])
    return len(trials)


# --- what is measured -------------------------------------------------------------------------------------------------


def validate(folder: Path) -> str:
    from ablations.run.session import preview

    specs = tuple(sorted(str(path) for path in (folder / "specs").glob("*.yaml")))
    plan = preview(Settings(model="digits_vit_tiny", specs=specs))
    return f"{sum(map(len, plan.trials.values()))} trials"


def resume(folder: Path) -> str:
    session = opened(folder)
    work = session.computations(session.pending())
    return f"{len(session.all_trials)} trials, {len(work)} left"


def compact(folder: Path) -> str:
    from ablations.run.execution import compact as collect

    return f"{collect(opened(folder))} rows"


def status(folder: Path) -> str:
    from ablations.store.status import lines, look

    return lines(look(Store(folder / "out")))[1]


def look_again(folder: Path) -> str:
    """What one more look of ``status --watch`` costs: the first is not counted."""
    from ablations.store.status import look

    store = Store(folder / "out")
    look(store)
    started = time.perf_counter()
    look(store)
    return f"{time.perf_counter() - started:.2f} s a look after the first"


def frame(folder: Path) -> str:
    from analysis.frame import read_results

    return f"{len(read_results(folder / 'out').finished)} finished rows"


def frame_of_parts(folder: Path) -> str:
    """The frame of a run that was stopped before it compacted."""
    hidden = folder / "out" / "results.parquet"
    aside = hidden.with_name("aside")
    hidden.rename(aside)
    try:
        return frame(folder)
    finally:
        aside.rename(hidden)


STEPS: dict[str, Callable[[Path], str]] = {
    "validate": validate,
    "resume, nothing indexed": resume,
    "resume": resume,
    "status": status,
    "status, again": look_again,
    "compact": compact,
    "analysis frame": frame,
    "analysis frame, not compacted": frame_of_parts,
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step took, imports not counted."""

    seconds: float
    megabytes: float  # the most that the process held
    said: str


def measure(step: str, folder: Path) -> Cost:
    """Run one step in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ablations.scale", "step", str(folder), step],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _step(folder: Path, step: str) -> None:
    import analysis.frame  # noqa: F401  # imports are the same for one trial and for many

    started = time.perf_counter()
    said = STEPS[step](folder)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "megabytes": most_held(), "said": said}))


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    if command == "step":
        _step(Path(where), rest[0])
    else:
        begun = time.perf_counter()
        count = fill(Path(where), int(rest[0]) if rest else COUNT)
        print(f"{count} trials, written in {time.perf_counter() - begun:.0f} s")
        print("| step | seconds | MB | |\n|---|---|---|---|")
        for name in STEPS:
            cost = measure(name, Path(where))
            print(f"| {name} | {cost.seconds:.1f} | {cost.megabytes:.0f} | {cost.said} |", flush=True)
