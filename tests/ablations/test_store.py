"""The store: whole files or none, nothing outside OUT, and nothing mixed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from ablations.records.files import atomic, read_json, write_json
from ablations.records.schema import ROW_SCHEMA
from ablations.records.storage import Disk, StoreError
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.store import index, trial_log
from ablations.store.index import RowIndex
from ablations.store.store import Store
from ablations.trial.target import Target
from ablations.trial.trial import Trial, TrialError, TrialResult, failed, trial_from
from tests.ablations.results import finished
from tests.ablations.runs import ROOT, SPEC


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out").create()


@pytest.fixture
def trials(target: Target) -> list[Trial]:
    return expand(parse_spec(SPEC), target)


def test_what_is_saved_is_read_back(store: Store, trials: list[Trial], target: Target) -> None:
    result = finished(trials[0], target.facts)
    store.save(result)
    assert store.finished() == {trials[0].key}
    assert store.load(trials[0].key) == {**result.row, "blocks": [3]}
    images = pq.read_table(store.out / "images" / f"{trials[0].key}.parquet").to_pylist()
    assert images[3]["kept"] == [b"\xff"] and images[3]["coverage"] is None and images[3]["tokens"] == [65, 9]


def test_a_failed_trial_is_kept_but_not_finished(store: Store, trials: list[Trial], target: Target) -> None:
    store.save(failed(trials[0], target.facts, "no memory"))
    assert store.finished() == set()
    store.compact([trials[0].key])
    assert pq.read_table(store.results).to_pylist()[0]["error"] == "no memory"
    store.save(finished(trials[0], target.facts))
    assert store.finished() == {trials[0].key}


@pytest.mark.parametrize("damage", ["short", "empty", "text", "other key", "no images", "short images", "other images"])
def test_a_damaged_result_is_ignored_with_a_warning(
    damage: str, store: Store, trials: list[Trial], target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    for trial in trials[:2]:
        store.save(finished(trial, target.facts))
    row, images = (folder / f"{trials[0].key}.parquet" for folder in ((store.out / "trials"), (store.out / "images")))
    content = row.read_bytes()
    if damage == "short":
        row.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        row.write_bytes(b"")
    elif damage == "text":
        row.write_text("not parquet")
    elif damage == "other key":
        row.write_bytes((store.out / "trials" / f"{trials[1].key}.parquet").read_bytes())
    elif damage == "no images":
        images.unlink()
    elif damage == "other images":
        images.write_bytes((store.out / "images" / f"{trials[1].key}.parquet").read_bytes())
    else:
        images.write_bytes(images.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert store.finished() == {trials[1].key}
    assert trials[0].key in caplog.text and "computed again" in caplog.text


def test_a_writer_killed_half_way_leaves_nothing_that_counts(store: Store, trials: list[Trial]) -> None:
    key = trials[0].key
    code = (
        "import os, signal, sys; from pathlib import Path; from ablations.records.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = store.out / "trials" / f"{key}.parquet"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False).returncode == -9
    left = list((store.out / "trials").iterdir())
    assert len(left) == 1 and left[0].name.endswith(".tmp") and store.rows() == {}
    store.create()
    assert left[0].exists(), "it may be another run's, still being written"
    long_ago = time.time() - 7200
    os.utime(left[0], (long_ago, long_ago))
    store.create()
    assert list((store.out / "trials").iterdir()) == []


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
    store.save(finished(trials[0], target.facts))
    store.save(failed(trials[1], target.facts, "reason"))
    old = dataclasses.replace(trials[2], weights_digest="0" * 64)
    store.save(finished(old, target.facts))
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
    result = finished(trials[0], target.facts)
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


def test_what_was_read_once_is_known_without_opening_it_again(
    store: Store, trials: list[Trial], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in trials[:3]:
        store.save(finished(trial, target.facts))
    store.compact([])
    opened: list[str] = []
    monkeypatch.setattr(RowIndex, "_read", lambda self, keys, listed: opened.extend(keys))
    monkeypatch.setattr(RowIndex, "_count_images", lambda self, key: opened.append(f"images of {key}"))
    other = Store(store.out)
    assert other.finished() == {trial.key for trial in trials[:3]} and opened == []
    assert other.rows().keys() == {trial.key for trial in trials[:3]}


def test_a_changed_file_is_read_again_and_a_removed_one_forgotten(
    store: Store, trials: list[Trial], target: Target
) -> None:
    store.save(failed(trials[0], target.facts, "no memory"))
    store.save(finished(trials[1], target.facts))
    store.save(finished(trials[2], target.facts))
    store.compact([])
    store.save(finished(trials[0], target.facts))
    (store.out / "trials" / f"{trials[1].key}.parquet").unlink()
    (store.out / "images" / f"{trials[2].key}.parquet").write_bytes(b"")
    for known in (store, Store(store.out)):
        assert known.rows().keys() == {trials[0].key, trials[2].key}
        assert known.finished() == {trials[0].key}


def test_the_index_is_appended_to_joined_now_and_then_and_never_needed(
    store: Store, trials: list[Trial], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.cache / "index"
    monkeypatch.setattr(index, "_SEGMENTS", 3)
    contents: dict[Path, bytes] = {}
    for count, trial in enumerate(trials[:3], start=1):
        store.save(finished(trial, target.facts))
        store.compact([])
        assert all(path.read_bytes() == content for path, content in contents.items()), "segments do not change"
        contents = {path: path.read_bytes() for path in folder.iterdir()}
        assert len(contents) == count
    store.save(finished(trials[3], target.facts))
    store.compact([])
    (joined,) = folder.iterdir()
    assert pq.read_metadata(joined).num_rows == 4
    joined.write_bytes(b"damaged")
    assert Store(store.out).finished() == {trial.key for trial in trials}
    joined.unlink()
    assert Store(store.out).finished() == {trial.key for trial in trials}


def flip_a_bit(path: Path) -> None:
    content, column = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0).column(1)
    first = column.dictionary_page_offset or column.data_page_offset
    content[first + column.total_compressed_size - 1] ^= 0x04  # the end of the last page
    path.write_bytes(bytes(content))


def test_a_flipped_bit_is_noticed_by_its_checksum(
    store: Store, trials: list[Trial], target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(finished(trials[0], target.facts))
    flip_a_bit(store.out / "trials" / f"{trials[0].key}.parquet")
    assert store.finished() == set()
    assert "computed again" in caplog.text


def test_a_flipped_bit_in_the_images_is_noticed_where_they_are_verified_once(
    store: Store, trials: list[Trial], target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    for trial in trials:
        store.save(finished(trial, target.facts))
    flip_a_bit(store.out / "images" / f"{trials[0].key}.parquet")
    assert len(store.finished()) == 4, "its end is whole, and nobody looked further"
    whole = {trial.key for trial in trials[1:]}
    assert store.finished(verify=True) == whole
    assert trials[0].key in caplog.text and "computed again" in caplog.text
    store.compact([])
    opened: list[str] = []
    again = Store(store.out)
    read = index.read_parquet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "read_parquet", lambda storage, name: (opened.append(name), read(storage, name))[1])
        assert again.finished(verify=True) == whole
    assert [name for name in opened if name.startswith("images/")] == [f"images/{trials[0].key}.parquet"]


def test_what_was_verified_is_not_verified_again_whatever_the_order_of_segments(
    store: Store, trials: list[Trial], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows stand in the index twice: as they were stored, and as a later run found them whole."""
    for trial in trials:
        store.save(finished(trial, target.facts))
    names = iter(["b", "a"])  # the later segment is listed first
    monkeypatch.setattr(index.uuid, "uuid4", lambda: type("Name", (), {"hex": next(names)}))
    store.compact([])
    later = Store(store.out)
    assert len(later.finished(verify=True)) == 4
    later.compact([])
    assert sorted(path.stem for path in (store.out / "cache" / "index").iterdir()) == ["a", "b"]
    monkeypatch.setattr(RowIndex, "_read_images", lambda self, key: pytest.fail("read again"))
    assert len(Store(store.out).finished(verify=True)) == 4


def test_spoilt_images_stay_spoilt_until_they_are_computed_again(
    store: Store, trials: list[Trial], target: Target
) -> None:
    for trial in trials:
        store.save(finished(trial, target.facts))
    flip_a_bit(store.out / "images" / f"{trials[0].key}.parquet")
    assert len(store.finished(verify=True)) == 3
    assert len(store.finished()) == 3, "a look at its end does not make it whole"
    store.forget_spoilt()
    assert store.load(trials[0].key) is None, "nobody who asks for the row takes it for finished"
    store.save(finished(trials[0], target.facts))
    assert len(store.finished()) == 4


def test_timing_a_trial_is_stored_though_the_disk_refuses_once(
    store: Store, trials: list[Trial], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = dataclasses.replace(trials[0], measure="speed")
    store.keep(finished(timed, target.facts), timed)
    assert store.untimed.finished() == {timed.key} and store.finished() == set()
    write, refused = Disk.write, []

    def refuse_once(self: Disk, name: str, content: bytes) -> None:
        if name.startswith("trials/") and not refused:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, content)

    monkeypatch.setattr(Disk, "write", refuse_once)
    with pytest.raises(StoreError, match="free some space"):
        store.release(timed.key, {"speedup": 2.0})
    store.release(timed.key, {"speedup": 2.0})
    assert store.finished() == {timed.key} and store.rows()[timed.key]["speedup"] == 2.0


def test_results_are_open_to_anyones_pandas(store: Store, trials: list[Trial], target: Target) -> None:
    for trial in trials:
        store.save(finished(trial, target.facts))
    store.compact([trial.key for trial in trials])
    whole, parts = pd.read_parquet(store.results), pd.read_parquet(store.out / "trials")
    assert list(whole.columns) == list(parts.columns) == ROW_SCHEMA.names and len(whole) == len(parts) == 4
    assert set(whole["key"]) == set(parts["key"])


def test_a_row_says_exactly_which_trial_it_is_of(store: Store, trials: list[Trial], target: Target) -> None:
    store.save(finished(trials[0], target.facts))
    row = store.load(trials[0].key)
    assert row is not None and trial_from(row["trial"]) == trials[0] and row["code"] == trials[0].code
    with pytest.raises(TrialError, match="no trial of this version"):
        trial_from('{"unknown": 1}')


def test_left_overs_are_judged_by_the_clock_of_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is a day ahead must not remove what another is writing."""
    (store.out / "trials" / ".half.parquet.tmp").write_bytes(b"half")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    store.create()
    assert (store.out / "trials" / ".half.parquet.tmp").exists()


def test_the_log_of_a_trial_is_found_by_its_key(store: Store, trials: list[Trial]) -> None:
    keys = [trial.key for trial in trials[:2]]
    logger = logging.getLogger("ablations.somewhere")
    with store.log(keys):
        logger.info("epoch %d", 3)
    with contextlib.suppress(RuntimeError), store.log(keys[:1]):
        logger.warning("trying again")
        raise RuntimeError("no luck")
    logger.info("outside")
    first, second = (store.read_log(key) or "" for key in keys)
    assert "INFO ablations.somewhere: epoch 3" in first and "epoch 3" in second
    assert "trying again" in first and "RuntimeError: no luck" in first and "Traceback" in first
    assert "trying again" not in second and "outside" not in first
    assert store.read_log(trials[2].key) is None


def test_a_worker_that_is_killed_leaves_what_it_said(store: Store, trials: list[Trial]) -> None:
    key = trials[0].key
    code = (
        "import logging, os, signal, sys; from ablations.store.store import Store; store = Store(sys.argv[1])\n"
        f"with store.log(['{key}']):\n"
        "    logging.getLogger('ablations.x').warning('about to end'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, store.location], cwd=ROOT, check=False)
    assert done.returncode == -9
    store.add_to_logs([key], "lost: its worker was killed; tried again")
    text = store.read_log(key) or ""
    assert "about to end" in text and "WARNING" in text.splitlines()[-1] and "lost: its worker" in text


def test_a_log_stays_small_and_what_other_threads_say_is_not_in_it(
    store: Store, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_log, "MAX_BYTES", 2000)
    logger = logging.getLogger("reducers.somewhere")
    for attempt in range(40):
        with store.log([trials[0].key]):
            logger.info("attempt %d", attempt)
            other = threading.Thread(target=lambda: logger.info("of another job"))
            other.start()
            other.join()
    text = store.read_log(trials[0].key) or ""
    assert len(text) < 2100 and text.startswith("… earlier attempts") and "attempt 39" in text
    assert "of another job" not in text


def test_a_talkative_trial_fills_no_disk_while_it_runs(
    store: Store, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_log, "MAX_BYTES", 2000)
    path = store.out / "logs" / f"{trials[0].key}.log"
    with store.log([trials[0].key]):
        for number in range(1000):
            logging.getLogger("ablations.somewhere").info("line %d", number)
        assert path.stat().st_size < 3000
    assert "over after" in path.read_text()


def test_a_log_that_cannot_be_written_stops_nothing(
    store: Store, trials: list[Trial], caplog: pytest.LogCaptureFixture
) -> None:
    (store.out / "logs").write_text("in the way")
    with store.log([trials[0].key]):
        pass
    assert "cannot be written" in caplog.text
