"""Storage: a folder and an object store give the same answers, and a run in either leaves the same results."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ablations.cli.main import main
from ablations.records import storage as storages
from ablations.records.storage import Disk, Remote, Storage, StoreError, is_uri, open_storage
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.store.store import Store
from ablations.trial.target import Target
from ablations.trial.trial import Trial, failed
from tests.ablations.results import finished
from tests.ablations.runs import ROOT, SPEC, TINY, one_thread
from tests.s3 import local_s3


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with local_s3() as uri:
        yield uri


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        found = open_storage(tmp_path / "out")
    else:
        found = open_storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")
    found.make("", "trials")
    return found


def test_files_are_written_listed_moved_and_deleted(place: Storage) -> None:
    place.write("trials/a", b"first")
    place.write("trials/a", b"second")
    place.write("trials/b", b"")
    assert place.read("trials/a") == b"second"
    listed = place.entries("trials")
    assert {name: entry.size for name, entry in listed.items()} == {"a": 6, "b": 0}
    assert listed["a"] == place.entry("trials/a") and listed["a"].modified > 0
    place.move("trials/a", "trials/c")
    place.delete("trials/b")
    place.delete("trials/b")
    assert set(place.entries("trials")) == {"c"}
    assert place.entries("nowhere") == {} and place.entry("trials/a") is None
    with pytest.raises(FileNotFoundError):
        place.read("trials/a")
    with place.open("trials/c") as file:
        file.seek(3)
        assert file.read() == b"ond"


def test_kinds_of_places_are_told_apart(tmp_path: Path, bucket: str) -> None:
    assert is_uri("s3://bucket/a") and not is_uri("results") and not is_uri(Path("s3:/bucket"))
    assert isinstance(open_storage(f"file://{tmp_path}"), Disk) and isinstance(open_storage(f"{bucket}/x"), Remote)
    assert open_storage(f"{bucket}/x").below("cache/untimed") == f"{bucket}/x/cache/untimed"
    for wrong in ("nonsense://place", "s3://", "s3://key@bucket/place"):
        with pytest.raises(StoreError, match=r"cannot be opened .* s3://BUCKET/FOLDER"):
            open_storage(wrong)


def test_a_place_that_does_not_exist_is_refused_before_anything_runs(
    bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--serial", *TINY, "--out", f"{bucket}-missing/run", "--specs", "k_values"]) == 2
    printed = capsys.readouterr().err
    assert "cannot be written to s3://sievit-tests-missing/run" in printed and "--out" in printed


@pytest.fixture
def trials(target: Target) -> list[Trial]:
    return expand(parse_spec(SPEC), target)


@pytest.fixture
def remote(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path / "cache"))
    return Store(f"{bucket}/{tmp_path.name}-store").create()


def test_a_store_in_s3_keeps_what_one_on_a_disk_keeps(
    remote: Store, trials: list[Trial], target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Store(tmp_path / "disk").create()
    for store in (remote, disk):
        for trial in trials[:2]:
            store.save(finished(trial, target.facts))
        store.save(failed(trials[2], target.facts, "no memory"))
    rows, found = disk.rows(), remote.rows()
    assert {key: {**row, "created": None} for key, row in found.items()} == {
        key: {**row, "created": None} for key, row in rows.items()
    }
    keys = [trial.key for trial in trials]
    assert remote.finished() == disk.finished() == set(keys[:2])
    assert remote.compact(keys) == 3
    assert pq.read_table(remote.storage.open("results.parquet"))["key"].to_pylist() == keys[:3]
    assert remote.load_images(keys[0]).equals(disk.load_images(keys[0]))
    again = Store(remote.location)
    assert again.finished() == set(keys[:2]) and again.rows().keys() == set(keys[:3])

    content = remote.storage.read(f"trials/{keys[0]}.parquet")
    remote.write(f"trials/{keys[0]}.parquet", content[: len(content) // 2])
    assert Store(remote.location).finished() == {keys[1]}
    assert "computed again" in caplog.text


def test_a_timed_trial_waits_beside_the_results_in_s3_too(remote: Store, trials: list[Trial], target: Target) -> None:
    timed = dataclasses.replace(trials[0], measure="speed")
    remote.keep(finished(timed, target.facts), timed)
    assert remote.finished() == set() and remote.untimed.finished() == {timed.key}
    remote.release(timed.key, {"speedup": 1.5})
    assert remote.finished() == {timed.key} and remote.untimed.finished() == set()
    row = remote.load(timed.key)
    assert row is not None and row["speedup"] == 1.5


def test_a_run_into_s3_is_resumed_watched_and_drawn(
    bucket: str, tmp_path: Path, spec_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, the same results as on a disk."""
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path / "cache"))
    out = f"{bucket}/{tmp_path.name}-run"
    options = ["--serial", *TINY, "--specs", str(spec_path)]
    assert main(["run", *options, "--out", out]) == 0
    assert main(["run", *options, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["run", *options, "--out", out]) == 0
    assert "nothing to compute" in capsys.readouterr().out
    assert main(["status", out]) == 0
    assert "4 of 4 trials finished (100 %)" in capsys.readouterr().out
    there, here = Store(out).rows(), Store(tmp_path / "out").rows()
    assert there.keys() == here.keys()
    for key, row in here.items():
        for name in row.keys() - {"seconds", "created"}:
            assert row[name] == there[key][name], name
        assert Store(out).load_images(key).equals(Store(tmp_path / "out").load_images(key))
    assert not (ROOT / "s3:").exists(), "a URI was taken for a folder"
    capsys.readouterr()
    key = sorted(there)[0]
    assert main(["log", out, key[:8]]) == 0
    assert key in capsys.readouterr().out


def test_two_runs_into_one_place_in_s3_keep_out_of_each_others_way(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ablations.store.store as stores
    from ablations.store.lease import leased

    monkeypatch.setattr(stores, "leased", lambda place: leased(place, beat=0.2))
    with remote.lock(), pytest.raises(StoreError, match="another run"), Store(remote.location).lock():
        raise AssertionError("two runs at once")
    with remote.lock():
        pass


def test_a_writer_killed_half_way_leaves_no_object(remote: Store, trials: list[Trial]) -> None:
    code = (
        "import os, signal, sys; from ablations.records.storage import open_storage\n"
        "place = open_storage(sys.argv[1])\n"
        "stream = place.filesystem.open_output_stream(place._path('trials/half.parquet'))\n"
        "stream.write(b'x' * (6 << 20)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, remote.location], cwd=ROOT, env=one_thread(), check=False)
    assert done.returncode == -9
    assert remote.storage.entries("trials") == {}


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing_that_counts(
    full: int, tmp_path: Path, trials: list[Trial], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "out").create()
    store.save(finished(trials[0], target.facts))
    before = {path: path.read_bytes() for path in store.out.rglob("*") if path.is_file()}

    def no_space(handle: int) -> None:
        raise OSError(full, os.strerror(full))

    with monkeypatch.context() as patched:
        patched.setattr(storages.os, "fsync", no_space)
        with pytest.raises(StoreError, match=r"cannot be written to .*free some space") as raised:
            store.save(finished(trials[1], target.facts))
    assert raised.value.errno == full
    assert {path: path.read_bytes() for path in store.out.rglob("*") if path.is_file()} == before
    assert store.finished() == {trials[0].key}
    store.save(finished(trials[1], target.facts))
    assert store.finished() == {trial.key for trial in trials[:2]}


def test_a_disk_that_is_really_full_is_survived(tmp_path: Path, trials: list[Trial], target: Target) -> None:
    """/dev/full refuses every byte, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    store = Store(tmp_path / "out").create()
    store.save(finished(trials[0], target.facts))

    class Full(Disk):
        def write(self, name: str, content: object) -> None:
            with Path("/dev/full").open("wb", buffering=0) as file:
                file.write(b"x" * 4096)

    store.storage = Full(store.out)
    with pytest.raises(StoreError, match="No space left.*free some space"):
        store.save(finished(trials[1], target.facts))
    assert Store(store.out).finished() == {trials[0].key}
