"""Other systems (whole runs: ``tests/test_house.py``): affinity, locks, closed streams, ``~``, long paths."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ablations import system
from ablations.models.weight_files import ModelError
from ablations.records import locks
from ablations.records.files import absolute, cache_home
from ablations.run.ray import folder as folders
from ablations.run.ray.folder import LONGEST, ray_folder
from ablations.spec.model import find_specs
from ablations.spec.plain_yaml import SpecError
from ablations.workloads import open_model
from tests.ablations.runs import ROOT, SPEC, TINY, environment

POSIX = {
    "os": {
        "sched_getaffinity", "uname", "getuid", "geteuid", "getgid", "fork", "statvfs", "getloadavg", "sysconf",
        "mkfifo", "killpg",
        "setsid", "getpgid", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "nice", "chown", "setuid", "openpty",
    },
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGPIPE", "SIGALRM", "alarm", "setitimer", "pthread_kill"},
    "errno": {"EDQUOT"},
    "socket": {"AF_UNIX"},
}  # fmt: skip
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}


def sievit(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    given = {"cwd": ROOT, "env": environment(), "text": True, "timeout": 300, "check": False, **options}
    return subprocess.run([sys.executable, "-m", "ablations", *map(str, words)], **given)  # type: ignore[call-overload]


def test_what_only_some_systems_have_is_asked_for_in_one_place() -> None:
    found = []
    for package in ("ablations", "analysis", "reducers", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if node.attr in POSIX.get(node.value.id, ()):
                        found.append((name, node.attr))
                elif isinstance(node, ast.Import):
                    found += [(name, alias.name) for alias in node.names if alias.name in MODULES]
                elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
                    found.append((name, node.module))
    assert found == [("ablations/system.py", "sched_getaffinity")], "guarded by hasattr there"


def test_cores_are_those_this_process_may_use_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        assert system.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert system.cores() == os.cpu_count()


def test_one_lock_excludes_another_and_ends_with_its_file(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as one, (tmp_path / "lock").open("a") as other:
        locks.lock(one)
        with pytest.raises(BlockingIOError):
            locks.lock(other)
        one.close()
        locks.lock(other, wait=True)
    with (tmp_path / "lock").open("rb") as one, (tmp_path / "lock").open("rb") as other:
        locks.lock(one, shared=True)
        locks.lock(other, shared=True)


def test_where_there_are_no_locks_asking_for_one_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_fcntl", None)
    with (tmp_path / "lock").open("a") as file, pytest.raises(OSError, match="no locks"):
        locks.lock(file)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(1,), (1, 2)], ids=["stdout", "both"])
def test_a_run_with_closed_streams_runs_on(closed: tuple[int, ...], spec_path: Path, tmp_path: Path) -> None:
    shell = " ".join(f"{number}>&-" for number in closed)
    words = f'run --serial --out "{tmp_path}/out" {" ".join(TINY)} --specs "{spec_path}"'
    command = f'exec "{sys.executable}" -m ablations {words}'
    done = subprocess.run(
        ["sh", "-c", f"{command} {shell}"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(list((tmp_path / "out" / "trials").glob("*.parquet"))) == 4


def gone() -> int:
    """The end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.slow
def test_a_run_whose_reader_goes_runs_on(spec_path: Path, tmp_path: Path) -> None:
    writer = gone()
    done = sievit(
        "run", "--serial", "--out", tmp_path / "out", *TINY, "--specs", spec_path, stdout=writer, stderr=writer
    )
    os.close(writer)
    assert done.returncode == 0 and len(list((tmp_path / "out" / "trials").glob("*.parquet"))) == 4


def test_a_list_whose_reader_goes_ends_quietly() -> None:
    writer = gone()
    done = sievit("list", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# --- the home folder --------------------------------------------------------------------------------------------------


def test_the_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(SPEC)
    assert [file.path for file in find_specs(["~/mine.yaml"])] == [tmp_path / "mine.yaml"]
    monkeypatch.setenv("SIEVIT_CACHE", "~/cache")
    assert cache_home() == tmp_path / "cache" and absolute("~/w.safetensors") == str(tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=str(tmp_path)):
        open_model("digits_vit_tiny", weights="~/missing.safetensors", workload_name="embedded")
    with pytest.raises(SpecError, match="~nobody-here/x.yaml"):
        find_specs(["~nobody-here/x.yaml"])


# --- Ray's folder -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_gets_a_short_folder_of_its_own_that_goes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with ray_folder() as folder:
        assert folder is not None and folder.is_dir() and os.environ["RAY_TMPDIR"] == str(folder)
        assert len(str(folder) + folders._SOCKET) <= 107 and folder.stat().st_mode & 0o77 == 0
        assert not list(deep.iterdir())
    assert not folder.exists() and "RAY_TMPDIR" not in os.environ


def test_where_ray_finds_no_folder_the_way_out_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    places = [str(deep), "/proc/nowhere"]
    words = r"is too long .* /proc/nowhere cannot be written .*RAY_TMPDIR=FOLDER"
    with pytest.raises(OSError, match=words), ray_folder(places):
        pass


@pytest.mark.parametrize("place", ["/proc/nowhere", f"/tmp/{'d' * LONGEST}"])
def test_a_folder_chosen_for_ray_is_checked_before_anything_is_computed(
    place: str, spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ablations.cli.main import main

    monkeypatch.setenv("RAY_TMPDIR", place)
    assert main(["run", "--out", str(tmp_path / "out"), *TINY, "--specs", str(spec_path)]) == 2
    assert f"error: RAY_TMPDIR={place}" in capsys.readouterr().err and not (tmp_path / "out").exists()
