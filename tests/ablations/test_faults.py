"""What hurts a run from inside a trial or from the machine: each fault is injected, and what is promised holds.

``docs/faults.md`` lists them. Kills, interrupts and lost machines are in ``test_interruption``, ``test_kills`` and
``test_cluster``.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ablations.store.store import Store
from tests.ablations.runs import (
    LONGER,
    ROOT,
    TINY,
    alive,
    assert_goes_on,
    assert_same_results,
    environment,
    family_of,
    grid,
    launch,
    run,
    serial,
    stored,
    wait_until,
    workers_of,
)

GOOD = """\
name: faults
title: Trials that fail among trials that do not
arms:
  - {variant: good, vary: {K: [8, 16, 24, 32]}, x: K, stages: [{at: 3, stack: [{name: topk, budget: {count: $K}}]}]}
"""
FAULTY = "  - {variant: %s, stages: [{at: 3, stack: [{name: faulty, how: %s%s}]}]}\n"
HOWS = ("raise", "memory", "nan", "kill", "hang")


def spec_with(folder: Path, *arms: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "faults.yaml"
    path.write_text(GOOD + "".join(arms))
    return path


def by_variant(out: Path) -> dict[str, dict[str, object]]:
    return {str(row["variant"]): row for row in Store(out).rows().values()}


@pytest.mark.slow
def test_each_failure_is_tried_again_recorded_with_its_reason_and_stops_no_other(tmp_path: Path) -> None:
    """A trial that raises, one without memory, one of NaN, one that kills its worker, one that hangs: at once."""
    out = tmp_path / "out"
    arms = [FAULTY % (how, how, "") for how in HOWS]
    arms += [FAULTY % (f"{how} once", how, f", once: '{tmp_path / how}'") for how in ("raise", "kill", "hang")]
    spec = spec_with(tmp_path / "all", *arms)
    status, printed = run("run", "--out", out, *TINY, "--workers", "2", "--time-limit", "12", "--specs", spec)
    assert status == 1, printed
    assert "5 trials failed" in printed and "Traceback" not in printed
    rows = by_variant(out)
    assert rows["raise"]["error"] == "RuntimeError: raised on purpose"
    assert "the machine's memory ran out with 4 images at a time; give a smaller --batch" in str(
        rows["memory"]["error"]
    )
    assert "not finite" in str(rows["nan"]["error"])
    assert "the worker was killed or crashed" in str(rows["kill"]["error"])
    assert "(tried 3 times)" in str(rows["kill"]["error"])
    assert "no progress for 12 s, the time limit: it stood at faulty.py" in str(rows["hang"]["error"])
    assert "in decide (tried 3 times)" in str(rows["hang"]["error"])
    assert all(rows[how]["status"] == "failed" and rows[how]["top1"] is None for how in HOWS)
    for how in ("raise", "kill", "hang"):
        assert rows[f"{how} once"]["status"] == "ok", rows[f"{how} once"]["error"]
    logs = {how: Store(out).read_log(str(rows[how]["key"])) or "" for how in ("kill", "hang")}
    assert all(text.count("lost: ") == 3 and " trials on " in text for text in logs.values()), "of each try"
    assert rows["raise once"]["attempts"] == 2 and rows["kill once"]["attempts"] == 1
    good = [key for key, row in Store(out).rows().items() if row["variant"] == "good"]
    serial(tmp_path / "serial", spec_with(tmp_path / "good"))
    assert len(good) == 4
    assert_same_results(out, tmp_path / "serial", good)
    assert not (out / "cache" / "watch").exists(), "what told where a trial hung is not left behind"


@pytest.mark.slow
def test_a_trial_that_does_not_fit_on_the_gpu_takes_half_as_many_images_and_says_so(tmp_path: Path) -> None:
    spec = spec_with(
        tmp_path / "crowd", FAULTY % ("crowd", "crowd", ", images: 1"), FAULTY % ("never", "crowd", ", images: 0")
    )
    status, printed = run("run", "--serial", "--out", tmp_path / "out", *TINY, "--specs", spec)
    assert status == 1, printed
    rows = by_variant(tmp_path / "out")
    assert (rows["crowd"]["status"], rows["crowd"]["batch"], rows["crowd"]["evaluated_batch"]) == ("ok", 4, 1)
    assert rows["crowd"]["attempts"] == 4, "in a group, alone, by twos, one by one"
    assert rows["good"]["evaluated_batch"] == 4
    assert "the GPU's memory ran out with 1 image at a time" in str(rows["never"]["error"])


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_costs_nothing_that_is_finished(
    tmp_path: Path, ablate: Callable[..., int]
) -> None:
    """Every write fails from some moment on, by a limit that the kernel holds: as on a full disk or a used-up quota."""
    out, spec = tmp_path / "out", grid(tmp_path, 10)
    process = launch("run", "--serial", "--out", out, *TINY, *LONGER, "--specs", spec)
    wait_until(lambda: stored(out) >= 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 2, printed
    assert "error: the results cannot be written to" in printed and "Traceback" not in printed
    assert_goes_on(ablate, out, spec, trials=10)


def kilobytes(path: Path) -> int:
    """What a file, or all of a folder, takes on a disk that gives pages of 4 kB."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(-(-each.stat().st_size // 4096) * 4 for each in files)


_FULL_DISK = """
mount -t tmpfs -o size={size}k tmpfs {out} || exit 99
{python} -m ablations run {words} > {log} 2>&1; echo $? > {log}.first
ls {out}/trials | wc -l > {log}.kept
mount -o remount,size=64m {out} || exit 98
{python} -m ablations run {words} >> {log} 2>&1; echo $? > {log}.second
cp -r {out} {copy}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="makes a small disk of its own with unshare")
def test_a_really_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    out, log, spec, whole = tmp_path / "out", tmp_path / "log", grid(tmp_path, 16), tmp_path / "whole"
    out.mkdir()
    serial(whole, spec, *LONGER)
    late = (whole / "results.parquet", whole / "cache" / "index")  # written when all trials are finished
    room = kilobytes(whole) - sum(map(kilobytes, late))
    room -= sum(kilobytes(whole / folder) for folder in ("trials", "images", "logs")) // 2
    words = f"--serial --out {out} {' '.join(TINY)} {' '.join(LONGER)} --specs {spec}"
    script = _FULL_DISK.format(size=room, out=out, python=sys.executable, words=words, log=log, copy=tmp_path / "copy")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode in (1, 98, 99) and not log.exists():
        pytest.skip(f"no disk of its own can be made here: {done.stderr}")
    assert (tmp_path / "log.first").read_text().strip() == "2", log.read_text()
    assert "No space left on device" in log.read_text() and "free some space" in log.read_text()
    assert 1 <= int((tmp_path / "log.kept").read_text()) < 16
    assert (tmp_path / "log.second").read_text().strip() == "0", log.read_text()
    assert pq.read_table(tmp_path / "copy" / "results.parquet").num_rows == 16


@pytest.mark.slow
def test_a_worker_that_cannot_write_its_results_ends_the_run(tmp_path: Path, ablate: Callable[..., int]) -> None:
    """Computing on would lose every further result as well."""
    out, spec = tmp_path / "out", grid(tmp_path, 24)
    process = launch("run", "--out", out, *TINY, *LONGER, "--workers", "1", "--specs", spec)
    wait_until(lambda: stored(out) >= 2 and len(workers_of(process)) == 1, process)
    (worker,) = workers_of(process)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and "error: the results cannot be written to" in printed, printed
    assert_goes_on(ablate, out, spec, trials=24)


@pytest.mark.slow
def test_a_second_driver_is_kept_out_and_the_first_goes_on(
    tmp_path: Path, ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, spec = tmp_path / "out", grid(tmp_path, 8)
    process = launch("run", "--serial", "--out", out, *TINY, *LONGER, "--specs", spec)
    wait_until(lambda: stored(out) >= 1, process)
    process.send_signal(signal.SIGSTOP)  # it is not to end while the other looks
    assert ablate("run", *LONGER, "--specs", spec) == 2
    assert "another run is writing to" in capsys.readouterr().err
    process.send_signal(signal.SIGCONT)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert len(Store(out).finished()) == 8


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, ablate: Callable[..., int]) -> None:
    """A day forward or back at each look: durations come from other clocks, and no age of a file decides anything."""
    spec, true, wrong = grid(tmp_path, 4), tmp_path / "out", tmp_path / "wrong"
    assert ablate("run", "--specs", spec) == 0
    for _ in range(2):
        status, printed = run(
            "run", "--serial", "--out", wrong, *TINY, "--specs", spec, env=environment(SIEVIT_TEST_CLOCK="jumps")
        )
        assert status == 0, printed
    assert "nothing to compute" in printed, "what is finished stays finished, whenever it says it was"
    assert_same_results(wrong, true, Store(true).finished())
    assert all(0 < float(row["seconds"]) < 600 for row in Store(wrong).rows().values())


@pytest.mark.parametrize("year", [1971, 2070])
def test_files_from_another_time_are_finished_like_any_other(
    year: int, tmp_path: Path, ablate: Callable[..., int], spec_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ablate("run", "--specs", spec_path) == 0
    seconds = (year - 1970) * 365 * 86400
    for path in (*(out / "trials").iterdir(), *(out / "images").iterdir()):
        os.utime(path, (seconds, seconds))
    capsys.readouterr()
    assert ablate("run", "--specs", spec_path) == 0
    assert "nothing to compute" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes of its own run through /proc")
def test_a_killed_driver_takes_its_workers_with_it_and_loses_nothing(
    tmp_path: Path, ablate: Callable[..., int]
) -> None:
    out, spec = tmp_path / "out", grid(tmp_path, 24)
    process = launch("run", "--out", out, *TINY, *LONGER, "--workers", "2", "--specs", spec)
    wait_until(lambda: stored(out) >= 2, process)
    family = family_of(process.pid)
    assert len(family) > 3, "Ray and its workers"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until(lambda: not alive(family))
    assert_goes_on(ablate, out, spec, trials=24)
