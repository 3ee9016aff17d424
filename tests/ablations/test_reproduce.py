"""One trial again: the same numbers bit for bit, and a clear word where they are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ablations.records.schema import ROW_SCHEMA
from ablations.run.reproduce import ReproduceError, as_evaluated, recorded_trial, reproduce
from ablations.run.session import Settings, open_session
from ablations.store.status import find_key
from ablations.store.store import Store
from tests.ablations.results import finished

Ablate = Callable[..., int]

CALIBRATED = """\
name: sought
title: Settings that are sought, and a random choice
arms:
  - {variant: ATS, target: [0.6], x: target, stages: [{at: 3, stack: [{name: ats, budget: {count: auto}}]}]}
  - {variant: random, stages: [{at: 3, stack: [{name: random, budget: {count: 16}}]}]}
"""


@pytest.fixture
def run(ablate: Ablate, tmp_path: Path) -> Store:
    """A finished run of two trials, one of them calibrated."""
    spec = tmp_path / "sought.yaml"
    spec.write_text(CALIBRATED)
    assert ablate("run", "--specs", spec) == 0
    return Store(tmp_path / "out")


def changed(store: Store, key: str, **columns: object) -> None:
    """Put other values into the row of a trial."""
    row = {**(store.load(key) or {}), **columns}
    pq.write_table(pa.Table.from_pylist([row], ROW_SCHEMA), store.out / "trials" / f"{key}.parquet")


def test_every_trial_comes_out_as_recorded(run: Store, ablate: Ablate, capsys: pytest.CaptureFixture[str]) -> None:
    for key in sorted(run.finished()):
        found = reproduce(run, key[:8])
        assert found.same and found.notes == () and found.images == 10 and found.columns > 40
        capsys.readouterr()
        assert ablate("reproduce", key, "--out", run.out) == 0
        assert "the same: " in capsys.readouterr().out
    assert not list(run.out.glob("sievit-reproduce-*"))


def test_a_number_that_does_not_come_out_is_named(
    run: Store, ablate: Ablate, capsys: pytest.CaptureFixture[str]
) -> None:
    key = sorted(run.finished())[0]
    row = run.load(key)
    assert row is not None
    changed(run, key, gmacs_mean=row["gmacs_mean"] * (1 + 1e-15))
    images = run.load_images(key)
    loss = images["loss"].to_pylist()
    loss[3] += 1e-12
    images = images.set_column(images.schema.get_field_index("loss"), "loss", pa.array(loss))
    pq.write_table(images, run.out / "images" / f"{key}.parquet")
    found = reproduce(run, key)
    assert {(each.column, each.images) for each in found.differences} == {("gmacs_mean", 0), ("images/loss", 1)}
    capsys.readouterr()
    assert ablate("reproduce", key, "--out", run.out) == 1
    printed = capsys.readouterr().out
    assert "gmacs_mean: " in printed and "images/loss (1 images)" in printed and "2 columns differ" in printed


def test_other_versions_devices_and_code_are_mentioned_and_do_not_count(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = sorted(run.finished())[0]
    row = run.load(key)
    assert row is not None
    versions = {**json.loads(row["versions"]), "timm": "0.0.1"}
    changed(run, key, versions=json.dumps(versions), device="some GPU", seconds=1e6)
    monkeypatch.setattr("ablations.run.reproduce.changed_code", lambda trial: "evaluation")
    found = reproduce(run, key)
    assert found.same
    assert any("timm 0.0.1, here " in note for note in found.notes)
    assert any("recorded on some GPU" in note for note in found.notes)
    assert any("the code has changed since (evaluation)" in note for note in found.notes)


def test_a_failure_is_repeated_too(
    ablate: Ablate, tmp_path: Path, run: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    key = sorted(run.finished())[0]
    trial, _ = recorded_trial(run, key)
    changed(run, key, status="failed", error="RuntimeError: a bad day", top1=None)
    capsys.readouterr()
    assert ablate("reproduce", trial.key, "--out", run.out) == 1
    printed = capsys.readouterr().out
    assert "recorded: failed, RuntimeError: a bad day" in printed and "now:      ok, top-1" in printed


def test_a_halved_batch_and_a_timed_trial_are_evaluated_as_they_were(run: Store) -> None:
    key = sorted(run.finished())[0]
    trial, row = recorded_trial(run, key)
    again, notes = as_evaluated(trial, {**row, "evaluated_batch": 2})
    assert again == dataclasses.replace(trial, batch=2) and "its batch was 2 in place of 4" in notes[0]
    timed = dataclasses.replace(trial, measure="speed", batch=1, code=f"{trial.code} timing=0")
    again, notes = as_evaluated(timed, {**row, "batch": 4})
    assert again == trial and "timing" in notes[0]


def test_a_trial_that_cannot_be_repeated_is_refused_with_the_remedy(run: Store, tmp_path: Path) -> None:
    key = sorted(run.finished())[0]
    for wrong, words in (("xyz", "is no key"), ("0" * 16, "has no trial"), ("../../etc", "is no key")):
        with pytest.raises(ValueError, match=words):
            find_key(run, wrong)
    trial, _ = recorded_trial(run, key)
    twin = dataclasses.replace(trial, variant="twin")
    changed(run, key, trial=twin.description)
    with pytest.raises(ReproduceError, match="the file was changed"):
        reproduce(run, key)
    changed(run, key, trial=None)
    with pytest.raises(ReproduceError, match="did not record its trial"):
        reproduce(run, key)
    changed(run, key, trial=trial.description)
    moved = dataclasses.replace(trial, data_digest="0" * 64)
    facts = open_session(
        Settings(tmp_path / "plan", model="digits_vit_tiny", weights="random", limit=10, batch=4,
                 specs=(str(tmp_path / "sought.yaml"),))
    ).facts  # fmt: skip
    run.save(finished(moved, facts))
    with pytest.raises(ReproduceError, match=r"the images are not those of the trial .*--data"):
        reproduce(run, moved.key)
    record = run.read_json("run.json")
    record.pop("settings")
    run.write_json("run.json", record)
    with pytest.raises(ReproduceError, match="does not say what the trial was run with"):
        reproduce(run, key)
