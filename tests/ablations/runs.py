"""Runs in processes of their own, for tests that hurt them: started, watched, counted, compared."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ablations.store.store import Store

ROOT = Path(__file__).parents[2]
TINY = ("--model", "digits_vit_tiny", "--weights", "random", "--limit", "10", "--batch", "4")

SPEC = """\
name: tiny
title: A tiny question
base:
  x: budget
  vary: {K: [48, 96]}
  stages: [{at: 3, stack: [{name: $method, budget: {ratio: $K/196, of: initial, rounding: nearest}}]}]
arms:
  - {variant: ATS, set: {method: ats}}
  - {variant: top-K, set: {method: topk}}
"""

FAULTS = Path(__file__).parent / "faults"
PATIENCE = 300.0  # seconds; the machine may be busy
NOT_COMPARED = {
    "seconds", "created", "shared_prefix", "device", "versions", "peak_memory_mb", "attempts", "train_seconds",
}  # fmt: skip
LONGER = ("--limit", "240", "--batch", "60")  # a moment for each trial, so that a run can be stopped among them

_launched: list[subprocess.Popen[str]] = []

GRID = """\
name: longer
title: Enough trials to be stopped among them
base:
  vary: {K: [%s]}
  x: K
  stages: [{at: 3, stack: [{name: $method, budget: {count: $K}}]}]
arms:
  - {variant: ATS, set: {method: ats}}
  - {variant: top-K, set: {method: topk}}
"""


def grid(folder: Path, trials: int) -> Path:
    """A spec of so many trials (an even number), in a file."""
    path = folder / "longer.yaml"
    path.write_text(GRID % ", ".join(str(8 + step) for step in range(trials // 2)))
    return path


def one_thread() -> dict[str, str]:
    """The environment of processes that must not fight for the machine's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def environment(**more: str) -> dict[str, str]:
    """Of a run that may fail on purpose; ``more`` on top."""
    paths = [str(FAULTS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {name: value for name, value in one_thread().items() if name != "RAY_ADDRESS"}
    return {**own, "PYTHONPATH": os.pathsep.join(paths), **more}


def launch(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start ``python -m ablations`` with these words; what is left of it ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ablations", *map(str, arguments)],
        cwd=ROOT, env=dict(env or environment()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # a shell starts what it runs in the background with Ctrl-C switched off, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    _launched.append(process)
    return process


def end_launched() -> None:
    """Kill whatever a test that failed has left."""
    while _launched:
        process = _launched.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def run(
    *arguments: str | Path, env: Mapping[str, str] | None = None, patience: float = 2 * PATIENCE
) -> tuple[int, str]:
    """Exit status and all that was printed."""
    process = launch(*arguments, env=env)
    printed = process.communicate(timeout=patience)[0]
    return process.returncode, printed


def serial(out: Path, spec: Path, *more: str) -> dict[str, dict[str, Any]]:
    """What an undisturbed run in one process finds: its rows by key."""
    status, printed = run("run", "--serial", "--out", out, *TINY, *more, "--specs", spec)
    assert status == 0, printed
    return Store(out).rows()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something to become true, while the process runs, but not for ever."""
    limit = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < limit, "waited in vain"
        if process is not None:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def stored(out: Path) -> int:
    """How many results there are."""
    return len(list((out / "trials").glob("*.parquet")))


def family_of(pid: int) -> list[int]:
    """The processes that descend from one, and no others: some may belong to another run."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while found := {one for one, parent in parents.items() if parent in family} - family:
        family |= found
    return sorted(family - {pid})


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The Ray workers of a process we started; one that is between two jobs goes by another name."""
    names: dict[int, bytes] = {}
    for pid in family_of(process.pid):
        with suppress(OSError):  # gone in the meantime
            names[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [pid for pid, name in names.items() if name.startswith(b"ray::ImplicitFunc")]


def alive(pids: Iterable[int]) -> list[int]:
    """Those that still run; a dead child that nobody asked after does not."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def fingerprints(out: Path, keys: Iterable[str]) -> dict[str, tuple[str, str, int]]:
    """Digests of both files of a finished trial, and when the first was written: a trial computed twice differs."""
    found = {}
    for key in keys:
        row, images = (out / folder / f"{key}.parquet" for folder in ("trials", "images"))
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (row, images)]
        found[key] = digests[0], digests[1], row.stat().st_mtime_ns
    return found


def assert_goes_on(ablate: Callable[..., int], out: Path, spec: Path, *, trials: int) -> None:
    """The same command after a run that ended in the middle: what was finished is kept, to the last bit and untouched,
    and the others are computed.
    """
    kept = Store(out).finished()
    assert 2 <= len(kept) < trials and stored(out) == len(kept), "it ended in the middle"
    before, wrote = fingerprints(out, kept), StringIO()
    with redirect_stdout(wrote):
        assert ablate("run", *LONGER, "--specs", spec) == 0
    assert f"{trials - len(kept)} to compute" in wrote.getvalue()
    assert fingerprints(out, kept) == before
    assert pq.read_table(out / "results.parquet").num_rows == trials


def assert_same_results(one: Path, other: Path, keys: Iterable[str]) -> None:
    """Two runs found the same, to the last bit, in every column but times, memory, device and versions."""
    rows, others = Store(one).rows(), Store(other).rows()
    for key in keys:
        for name in rows[key].keys() - NOT_COMPARED:
            assert rows[key][name] == others[key][name], (rows[key]["variant"], rows[key]["x"], name)
        first, second = (pq.read_table(out / "images" / f"{key}.parquet") for out in (one, other))
        assert first.equals(second), key
