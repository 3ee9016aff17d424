"""Runs in processes of their own, with and without Ray: killed, interrupted, resumed, and equal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ablations.store import Store
from tests.ablations.conftest import ROOT, TINY, one_thread

Start = Callable[..., "subprocess.Popen[str]"]
_LONGER = ("--limit", "240", "--batch", "60")  # a moment for each trial, so that a run can be stopped among them
_PATIENCE = 300.0  # seconds; the machine may be busy

LONGER = """\
name: longer
title: Enough trials to be stopped among them
base:
  vary: {K: [8, 16, 24, 32, 40, 48, 56, 64]}
  x: K
  stages: [{at: 3, stack: [{name: $method, budget: {count: $K}}]}]
arms:
  - {variant: ATS, set: {method: ats}}
  - {variant: top-K, set: {method: topk}}
"""


@pytest.fixture
def longer(tmp_path: Path) -> Path:
    path = tmp_path / "longer.yaml"
    path.write_text(LONGER)
    return path


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait while the process runs, but not for ever."""
    limit = time.monotonic() + _PATIENCE
    while not true():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The Ray workers that descend from a process we started, and no others: some may belong to another run."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = {process.pid}
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    names: dict[int, bytes] = {}
    for pid in sorted(family):
        with suppress(OSError):  # gone in the meantime
            names[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [pid for pid, name in names.items() if name.startswith(b"ray::ImplicitFunc")]


def stop_after_two(process: subprocess.Popen[str], out: Path, how: signal.Signals) -> str:
    """Send a signal once two trials are on disk; what the process printed."""
    wait_until(lambda: len(list((out / "trials").glob("*.parquet"))) >= 2, process)
    process.send_signal(how)
    return process.communicate(timeout=_PATIENCE)[0]


def test_a_killed_run_loses_nothing_and_goes_on(
    longer: Path, tmp_path: Path, start: Start, ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = start("run", "--serial", "--out", out, *TINY, *_LONGER, "--specs", longer)
    stop_after_two(process, out, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = Store(out).finished()
    assert 2 <= len(kept) < 16, "killed in the middle"
    before = {key: (out / "trials" / f"{key}.parquet").stat().st_mtime_ns for key in kept}

    assert ablate("run", *_LONGER, "--specs", longer) == 0
    assert f"{16 - len(kept)} to compute" in capsys.readouterr().out
    assert pq.read_table(out / "results.parquet").num_rows == 16
    assert {key: (out / "trials" / f"{key}.parquet").stat().st_mtime_ns for key in kept} == before


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    """Kill the one worker of a run, as a machine out of memory would."""
    wait_until(lambda: len(workers_of(process)) == 1, process)  # between two jobs it goes by another name
    with suppress(ProcessLookupError):
        os.kill(workers_of(process)[0], signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker of its own run through /proc")
def test_a_run_on_ray_survives_its_worker_is_interrupted_and_goes_on(
    longer: Path, tmp_path: Path, start: Start, ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = start("run", "--out", out, *TINY, *_LONGER, "--workers", "1", "--specs", longer)
    wait_until(lambda: len(list((out / "trials").glob("*.parquet"))) >= 2, process)
    kill_a_worker(process)

    printed = stop_after_two(process, out, signal.SIGINT)
    assert process.returncode == 130, printed
    assert "the same command goes on from there" in printed and "Traceback" not in printed
    kept = Store(out).finished()
    assert 2 <= len(kept) < 16
    assert pq.read_table(out / "results.parquet").num_rows == len(kept), "what there is is compacted"
    assert not (out / "ray").exists()

    assert ablate("run", *_LONGER, "--specs", longer) == 0, "with or without Ray, it is the same run"
    assert f"{16 - len(kept)} to compute" in capsys.readouterr().out
    assert pq.read_table(out / "results.parquet").num_rows == 16


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker of its own run through /proc")
def test_trials_that_lose_their_worker_are_tried_again_alone_and_then_given_up(
    longer: Path, tmp_path: Path, start: Start
) -> None:
    """The other trials of a group must not pay for one that kills its worker."""
    out = tmp_path / "out"
    process = start("run", "--out", out, *TINY, *_LONGER, "--workers", "1", "--specs", longer)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True)
    reader.start()
    limit = time.monotonic() + _PATIENCE
    while not any(row["status"] == "failed" for row in Store(out).rows().values()):
        assert process.poll() is None and time.monotonic() < limit, log
        for pid in workers_of(process)[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert process.wait(timeout=_PATIENCE) == 1, log
    reader.join(timeout=_PATIENCE)
    rows = Store(out).rows()
    lost = [row for row in rows.values() if row["status"] == "failed"]
    assert len(rows) == 16 and 1 <= len(lost) < 16
    assert all("killed or crashed" in row["error"] and row["top1"] is None for row in lost)
    assert any("are tried again one by one" in line for line in log)


def test_workers_find_what_a_serial_run_finds_and_a_failing_trial_stops_no_other(longer: Path, tmp_path: Path) -> None:
    """Alone or in a group. One trial is planned for other data than the workers find: its result would be of something
    else.
    """
    code = """
import dataclasses, sys, torch
from pathlib import Path
from ablations.context import Contexts, make_context, save_context
from ablations.jobs import Job, schedule
from ablations.progress import RunProgress
from ablations.runner import run_on_ray
from ablations.serial import run_serial
from ablations.session import Settings, open_session
from ablations.store import Store

out, spec = sys.argv[1:]
session = open_session(
    Settings(Path(out) / "ray", model="digits_vit_tiny", weights="random", limit=20, batch=8, specs=(spec,))
)
work = session.computations(session.all_trials[5:10])
stale = dataclasses.replace(work[1].trial, data_digest="0" * 64)
contexts = Contexts(lambda model: make_context(session, torch.device("cpu"), model=model))
context = contexts[session.facts.name]
serial = RunProgress(work[1:])
store = Store(Path(out) / "serial").create()
run_serial([Job((one,)) for one in work[1:]], contexts=contexts, store=store, progress=serial)
broken = [dataclasses.replace(work[1], trial=stale, answers=(stale,)), *work[1:]]
progress = RunProgress(broken, terminal=True)  # Tune must cope with a bar as well
saved = {session.facts.name: save_context(session, context)}
assert any(len(job.computations) > 1 for job in schedule(broken, workers=1))
with progress:
    run_on_ray(
        broken, contexts=saved, facts=session.all_facts, store=session.store, progress=progress, workers=1
    )
print(serial.finished, progress.finished, progress.failures)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, longer],
        cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=_PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 5 [(") and "the data changed after the trial was planned" in done.stdout
    by_ray, serial = (Store(tmp_path / folder).rows() for folder in ("ray", "serial"))
    (failed,) = (key for key in by_ray if key not in serial)
    assert by_ray[failed]["status"] == "failed" and "the data changed" in by_ray[failed]["error"]
    for key, row in serial.items():
        for name in row.keys() - {"seconds", "created", "shared_prefix"}:
            assert row[name] == by_ray[key][name], (row["variant"], row["x"], name)
        one, other = (pq.read_table(tmp_path / folder / "images" / f"{key}.parquet") for folder in ("ray", "serial"))
        assert one.equals(other)
