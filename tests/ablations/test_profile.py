"""Where the time went: parts that add up to the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ablations.measure.profile import Profile, profile_rows, profile_words, summary


def test_parts_add_up_to_the_run() -> None:
    profile = Profile()
    profile.merge({"imports": 2.0, "evaluation": 6.0, "idle": 2.0})
    profile.add("evaluation", 1.0)
    found = summary(profile, wall=10.0, workers=2, trials=7, computations=5)
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    seconds = {part["part"]: part["seconds"] for part in found["parts"]}
    assert seconds == {"imports": 2.0, "evaluation": 3.5, "idle": 1.0, "rest": 3.5}
    assert found["overhead"] == pytest.approx(1.0 / 3.5)
    assert profile_rows(found)[-1] == ["all", "10.0", "100.0 %"]
    assert "5 computations for 7 trials on 2 workers" in profile_words(found)


def test_a_block_is_timed_also_when_it_fails() -> None:
    profile = Profile()

    def fails() -> None:
        with profile.measure("writing"):
            time.sleep(0.01)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fails()
    assert profile.take()["writing"] >= 0.01 and profile.take() == {}


def test_an_unknown_part_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Profile().add("coffee", 1.0)


def test_a_run_says_where_its_time_went(
    ablate: Callable[..., int], spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", "--specs", spec_path, "--profile") == 0
    printed = capsys.readouterr().out
    assert "where the time went" in printed and "4 computations for 4 trials on 1 worker" in printed
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    parts = {part["part"]: part["seconds"] for part in found["parts"]}
    assert {"opening", "dense", "images", "prefix", "evaluation", "bookkeeping", "writing", "records"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(found["wall_seconds"]) and min(parts.values()) > -0.05
    before = (tmp_path / "out" / "profile.json").stat().st_mtime_ns
    assert ablate("run", "--specs", spec_path) == 0
    assert "where the time went" not in capsys.readouterr().out
    assert (tmp_path / "out" / "profile.json").stat().st_mtime_ns == before, "a run that computed nothing tells nothing"
