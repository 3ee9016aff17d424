"""The store: whole files or none, nothing outside OUT, and nothing mixed."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ablations.plan import Target, expand
from ablations.spec import parse_spec
from ablations.store import Store, StoreError, atomic, read_json, write_json
from ablations.trial import Trial, TrialResult, base_row, failed
from tests.ablations.conftest import ROOT, SPEC


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out").create()


@pytest.fixture
def trials(target: Target) -> list[Trial]:
    return expand(parse_spec(SPEC), target)


def finished(trial: Trial, target: Target) -> TrialResult:
    """A finished result of a trial, with the columns that a store looks at."""
    count = trial.images
    columns: dict[str, Any] = {
        "image": [f"test/{i}" for i in range(count)], "label": [1] * count, "prediction": [1] * count,
        "tokens": [[65, 9]] * count, "kept": [[b"\xff"]] * count, "coverage": None,
    }  # fmt: skip
    row = {**base_row(trial, target.facts), "status": "ok", "top1": 0.5, "tokens": [65.0, 9.0]}
    return TrialResult(row, columns)


def test_what_is_saved_is_read_back(store: Store, trials: list[Trial], target: Target) -> None:
    result = finished(trials[0], target)
    store.save(result)
    assert store.finished() == {trials[0].key}
    assert store.load(trials[0].key) == {**result.row, "blocks": [3]}
    images = pq.read_table(store.images / f"{trials[0].key}.parquet").to_pylist()
    assert images[3]["kept"] == [b"\xff"] and images[3]["coverage"] is None and images[3]["tokens"] == [65, 9]


def test_a_failed_trial_is_kept_but_not_finished(store: Store, trials: list[Trial], target: Target) -> None:
    store.save(failed(trials[0], target.facts, "no memory"))
    assert store.finished() == set()
    store.compact([trials[0].key])
    assert pq.read_table(store.results).to_pylist()[0]["error"] == "no memory"
    store.save(finished(trials[0], target))
    assert store.finished() == {trials[0].key}


@pytest.mark.parametrize("damage", ["short", "empty", "text", "other key", "no images", "short images"])
def test_a_damaged_result_is_ignored_with_a_warning(
    damage: str, store: Store, trials: list[Trial], target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    for trial in trials[:2]:
        store.save(finished(trial, target))
    row, images = (folder / f"{trials[0].key}.parquet" for folder in (store.trials, store.images))
    content = row.read_bytes()
    if damage == "short":
        row.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        row.write_bytes(b"")
    elif damage == "text":
        row.write_text("not parquet")
    elif damage == "other key":
        row.write_bytes((store.trials / f"{trials[1].key}.parquet").read_bytes())
    elif damage == "no images":
        images.unlink()
    else:
        images.write_bytes(images.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert store.finished() == {trials[1].key}
    assert trials[0].key in caplog.text and "computed again" in caplog.text


def test_a_writer_killed_half_way_leaves_nothing_that_counts(store: Store, trials: list[Trial]) -> None:
    key = trials[0].key
    code = (
        "import os, signal, sys; from pathlib import Path; from ablations.store import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = store.trials / f"{key}.parquet"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False).returncode == -9
    left = list(store.trials.iterdir())
    assert len(left) == 1 and left[0].name.endswith(".tmp") and store.rows() == {}
    store.create()
    assert left[0].exists(), "it may be another run's, still being written"
    long_ago = time.time() - 7200
    os.utime(left[0], (long_ago, long_ago))
    store.create()
    assert list(store.trials.iterdir()) == []


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), atomic(path):
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1} and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_results_hold_the_plan_alone_and_status_counts_the_rest(
    store: Store, trials: list[Trial], target: Target
) -> None:
    store.save(finished(trials[0], target))
    store.save(failed(trials[1], target.facts, "reason"))
    old = dataclasses.replace(trials[2], weights_digest="0" * 64)
    store.save(finished(old, target))
    keys = [trial.key for trial in trials]
    assert store.compact(keys) == 2
    assert pq.read_table(store.results)["key"].to_pylist() == keys[:2]
    (status,) = store.status({"tiny": keys})
    assert (status.planned, status.finished, status.failed, status.stale) == (4, 1, 1, 1)


def test_a_plan_without_any_result_gives_an_empty_table(store: Store) -> None:
    assert store.compact([]) == 0
    assert pq.read_table(store.results).num_rows == 0


@pytest.mark.parametrize("key", ["../../evil", "a" * 15, "A" * 16, "0123456789abcde/", ""])
def test_no_key_leads_out_of_the_folder(key: str, store: Store, trials: list[Trial], target: Target) -> None:
    result = finished(trials[0], target)
    with pytest.raises(ValueError, match="no trial key"):
        store.save(TrialResult({**result.row, "key": key}, result.images))


def test_an_out_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be written to .*file.*--out"):
        Store(file).create()
    with pytest.raises(StoreError, match="cannot be written"):
        Store("/proc/nowhere").create()


def test_a_second_run_in_the_same_folder_is_kept_out(store: Store) -> None:
    with store.lock(), pytest.raises(StoreError, match="another run"), Store(store.out).lock():
        raise AssertionError("two runs at once")
    with store.lock():
        pass
