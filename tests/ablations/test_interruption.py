"""Runs in processes of their own, with and without Ray: killed, interrupted, resumed, and equal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ablations.store.store import Store
from tests.ablations.runs import (
    LONGER,
    PATIENCE,
    ROOT,
    TINY,
    assert_goes_on,
    assert_same_results,
    grid,
    launch,
    one_thread,
    run,
    stored,
    wait_until,
    workers_of,
)


def stop_after_two(process: subprocess.Popen[str], out: Path, how: signal.Signals) -> str:
    """Send a signal once two trials are on disk; what the process printed."""
    wait_until(lambda: stored(out) >= 2, process)
    process.send_signal(how)
    return process.communicate(timeout=PATIENCE)[0]


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_goes_on(tmp_path: Path, ablate: Callable[..., int]) -> None:
    out, spec = tmp_path / "out", grid(tmp_path, 16)
    process = launch("run", "--serial", "--out", out, *TINY, *LONGER, "--specs", spec)
    stop_after_two(process, out, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert_goes_on(ablate, out, spec, trials=16)


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    """Kill the one worker of a run, as a machine out of memory would."""
    wait_until(lambda: len(workers_of(process)) == 1, process)  # between two jobs it goes by another name
    with suppress(ProcessLookupError):
        os.kill(workers_of(process)[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_run_on_ray_finishes_its_trials(tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, printed = run("run", "--out", out, *TINY, "--workers", "1", "--specs", grid(tmp_path, 2))
    assert status == 0, printed
    assert stored(out) == 2 and {row["status"] for row in Store(out).rows().values()} == {"ok"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker of its own run through /proc")
def test_a_run_on_ray_survives_its_worker_is_interrupted_and_goes_on(
    tmp_path: Path, ablate: Callable[..., int]
) -> None:
    out, spec = tmp_path / "out", grid(tmp_path, 16)
    process = launch("run", "--out", out, *TINY, *LONGER, "--workers", "1", "--specs", spec)
    wait_until(lambda: stored(out) >= 2, process)
    kill_a_worker(process)

    printed = stop_after_two(process, out, signal.SIGINT)
    assert process.returncode == 130, printed
    assert "the same command goes on from there" in printed and "Traceback" not in printed
    assert pq.read_table(out / "results.parquet").num_rows == stored(out), "what there is is compacted"
    assert not (out / "ray").exists()
    assert_goes_on(ablate, out, spec, trials=16)  # with or without Ray, it is the same run


@pytest.mark.slow
def test_workers_find_what_a_serial_run_finds_and_a_failing_trial_stops_no_other(tmp_path: Path) -> None:
    """Alone or in a group. One trial is planned for other data than the workers find:
    its result would be of something else.
    """
    code = """
import dataclasses, sys, torch
from pathlib import Path
from ablations.run.contexts import Contexts, make_context, save_context
from ablations.run.jobs import Job, schedule
from ablations.run.progress import RunProgress
from ablations.run.ray.driver import run_on_ray
from ablations.run.serial import run_serial
from ablations.run.session import Settings, open_session
from ablations.store.store import Store

out, spec = sys.argv[1:]
session = open_session(
    Settings(Path(out) / "ray", model="digits_vit_tiny", weights="random", limit=20, batch=8, specs=(spec,))
)
work = session.computations(session.all_trials[5:10])
stale = dataclasses.replace(work[1].trial, data_digest="0" * 64)
contexts = Contexts(lambda model: make_context(session, torch.device("cpu"), model=model))
contexts[session.facts.name]  # the plain predictions
serial = RunProgress(work[1:])
store = Store(Path(out) / "serial").create()
run_serial([Job((one,)) for one in work[1:]], contexts=contexts, store=store, progress=serial)
broken = [dataclasses.replace(work[1], trial=stale, answers=(stale,)), *work[1:]]
progress = RunProgress(broken, terminal=True)  # Tune must cope with a bar as well
saved = {session.facts.name: save_context(session, session.facts.name)}
assert any(len(job.computations) > 1 for job in schedule(broken, workers=1))
with progress:
    run_on_ray(
        broken, contexts=saved, facts=session.all_facts, store=session.store, progress=progress, workers=1
    )
print(serial.finished, progress.finished, progress.failures)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, grid(tmp_path, 16)],
        cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 5 [(") and "the data changed after the trial was planned" in done.stdout
    by_ray, serial = (Store(tmp_path / folder).rows() for folder in ("ray", "serial"))
    (failed,) = (key for key in by_ray if key not in serial)
    assert by_ray[failed]["status"] == "failed" and "the data changed" in by_ray[failed]["error"]
    assert_same_results(tmp_path / "ray", tmp_path / "serial", serial)
