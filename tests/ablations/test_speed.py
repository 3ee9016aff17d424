"""Timed trials: alone, in turn with the plain model, after everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from ablations.measure import speed
from ablations.run import serial
from ablations.store.store import Store
from ablations.trial.stages import Stages
from ablations.workloads import open_workload

TIMED = """\
name: runtime
title: How fast
base:
  x: batch
  measure: speed
  batch: [1, 4]
  stages: [{at: 3, stack: [{name: $method, budget: {count: 20}}]}]
arms:
  - {variant: ATS, set: {method: ats}}
  - {variant: top-K, set: {method: topk}, batch: [4]}
"""
MEASURED = ("images_per_second", "dense_images_per_second", "speedup", "speedup_low", "speedup_high", "measured_batch")


@pytest.fixture
def timed_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed, "ROUNDS", (3, 3))
    monkeypatch.setattr(speed, "SHORTEST", 0.0)
    monkeypatch.setattr(speed, "cores", lambda: 1)  # threads of several tests would wait for one another
    path = tmp_path / "runtime.yaml"
    path.write_text(TIMED)
    return path


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "results.parquet").to_pylist()
    return found


def test_timed_trials_have_speeds_and_all_others_nulls(
    ablate: Callable[..., int], timed_spec: Path, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", "--specs", f"{timed_spec} {spec_path}", "--profile") == 0
    assert "7 to compute (6 computations" in capsys.readouterr().out, "one evaluation serves both batch sizes"
    found = rows(tmp_path / "out")
    timed = [row for row in found if row["spec"] == "runtime"]
    assert [row["measured_batch"] for row in timed] == [1, 4, 4] and len(found) == 7
    for row in timed:
        assert row["status"] == "ok" and row["batch"] == 4 and row["top1"] is not None and row["images"] == 10
        assert 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        ratio = row["images_per_second"] / row["dense_images_per_second"]
        assert 0.2 < ratio / row["speedup"] < 5
        assert "thread" in row["device"] and row["peak_memory_mb"] is None
        assert pq.read_metadata(tmp_path / "out" / "images" / f"{row['key']}.parquet").num_rows == 10
    for row in found:
        if row["spec"] == "tiny":
            assert {row[name] for name in MEASURED} == {None}
    assert not any((tmp_path / "out" / "cache" / "untimed" / "trials").iterdir()), "nothing is left to be timed"
    assert ablate("run", "--specs", timed_spec) == 0
    assert "nothing to compute" in capsys.readouterr().out


def test_an_interruption_before_the_timing_repeats_no_evaluation(
    ablate: Callable[..., int], timed_spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(serial, "measure_speed", interrupt)
        assert ablate("run", "--specs", timed_spec) == 130
    store = Store(tmp_path / "out")
    assert store.finished() == set() and len(store.untimed.finished()) == 3

    def computed_again(*_: object, **__: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(serial, "run_group", computed_again)
    assert ablate("run", "--specs", timed_spec) == 0
    assert len(store.finished()) == 3 and all(row["speedup"] for row in rows(tmp_path / "out"))


def test_a_trial_that_cannot_be_timed_is_recorded_as_failed(
    ablate: Callable[..., int], timed_spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = serial.measure_speed

    def fails(trial: Any, context: Any, *, stages: Stages) -> Any:
        if trial.batch == 1:
            raise RuntimeError("the clock is broken")
        return measure(trial, context, stages=stages)

    monkeypatch.setattr(serial, "measure_speed", fails)
    assert ablate("run", "--specs", timed_spec) == 1
    found = {row["key"]: row for row in rows(tmp_path / "out")}
    assert sorted(row["status"] for row in found.values()) == ["failed", "ok", "ok"]
    assert [row["error"] for row in found.values() if row["error"]] == ["RuntimeError: the clock is broken"]


def test_ratios_are_taken_round_by_round() -> None:
    columns = speed.columns_of([2.0, 4.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0], batch=8)
    assert columns["speedup"] == columns["speedup_low"] == columns["speedup_high"] == 2.0
    assert columns["images_per_second"] == pytest.approx(8 / 1.5) and columns["measured_batch"] == 8


def test_rates_are_of_the_median_round_and_bounds_are_quartiles_of_the_ratios() -> None:
    """Whatever one round that the machine disturbed took. Ratios: 2, 3, 4, 5 and 20."""
    columns = speed.columns_of([2.0, 3.0, 8.0, 5.0, 400.0], [1.0, 1.0, 2.0, 1.0, 20.0], batch=6)
    assert columns["images_per_second"] == 6.0 and columns["dense_images_per_second"] == 6 / 5
    assert [columns[name] for name in ("speedup_low", "speedup", "speedup_high")] == [3.0, 4.0, 5.0]
    even = speed.columns_of([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], batch=1)
    assert [even[name] for name in ("speedup_low", "speedup", "speedup_high")] == [1.75, 2.5, 3.25]


def test_the_models_take_turns_on_the_same_images() -> None:
    seen: list[tuple[str, int]] = []

    class Notes(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: Tensor) -> None:
            seen.append((self.name, int(images[0])))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "SHORTEST", 0.0)
        images = [torch.tensor([number]) for number in range(4)]
        dense, reduced = speed.in_turn(Notes("dense"), Notes("reduced"), images, device=torch.device("cpu"))
    assert len(dense) == len(reduced) == speed.ROUNDS[1], "rounds that take no time end at the most there are"
    rounds = seen[-2 * len(dense) :]
    for number in range(len(dense)):
        first, second = rounds[2 * number : 2 * number + 2]
        assert first[1] == second[1] == number % 4 and {first[0], second[0]} == {"dense", "reduced"}
        assert (first[0] == "dense") == (number % 2 == 1), "who begins changes"


def test_batches_are_spread_over_the_images_and_repeat_where_there_are_too_few() -> None:
    workload = open_workload("embedded", data=None, model="digits_vit_tiny", limit=10, strict=False, cache=None)
    one, *_ = speed.spread_batches(workload, 3)
    np.testing.assert_array_equal(one, torch.cat([workload.batch(row, row + 1) for row in (0, 3, 6)]))
    many = speed.spread_batches(workload, 25)
    assert len(many) == speed.BATCHES and all(len(batch) == 25 for batch in many)
    assert not torch.equal(many[0], many[1])


def test_all_cores_are_used_and_given_back() -> None:
    before = torch.get_num_threads()
    with speed.all_cores():
        assert torch.get_num_threads() >= before
    assert torch.get_num_threads() == before


class Clock:
    """Time that passes when a model is called, and not otherwise."""

    def __init__(self, a_pass: float) -> None:
        self.now, self.a_pass, self.passes = 0.0, a_pass, 0

    def __call__(self, images: Tensor) -> None:
        self.now, self.passes = self.now + self.a_pass, self.passes + 1

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("a_pass", "repeats", "rounds"),
    [
        (2.0, 1, speed.ROUNDS[0]),  # too slow for enough rounds in the time: the least there are
        (0.25, 1, 13),  # half a second a round: the thirteenth ends after the time was over
        (0.0625, 2, 25),  # an eighth, timed by twos: a quarter of a second a round
        (0.015625, 6, 33),
        (0.0009765625, 102, 31),
    ],
)
def test_rounds_end_when_there_was_time_enough_and_short_passes_are_timed_several_at_once(
    a_pass: float, repeats: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(a_pass)
    monkeypatch.setattr(speed, "time", clock)
    images = [torch.zeros(1)] * 4
    dense, reduced = speed.in_turn(clock, clock, images, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert len(dense) == len(reduced) == rounds
    assert dense + reduced == [a_pass] * (2 * rounds), "of one pass, however many were timed at once"
    assert clock.passes == 4 + 1 + 2 * rounds * repeats
    assert speed.expected_seconds(reduced=a_pass, dense=a_pass) == pytest.approx(clock.now)
