"""Twenty thousand trials: planning, resuming, looking and reading take little memory; docs/scale.md has times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ablations import scale
from tests.ablations.memory import STATUS, most_held

MEGABYTES = 1800.0  # of a process that has loaded torch: 20,000 rows must not add more than some hundreds


@pytest.mark.slow
def test_twenty_thousand_trials_fit_into_little_memory(tmp_path: Path) -> None:
    assert scale.fill(tmp_path) == scale.COUNT + 100, "the grid is a little larger, to be rectangular"
    costs = {step: scale.measure(step, tmp_path) for step in scale.STEPS}
    assert costs["resume"].said.endswith(f"{scale.LEFT} left")
    assert str(scale.COUNT + 90) in costs["analysis frame"].said == costs["analysis frame, not compacted"].said
    for step, cost in costs.items():
        assert cost.megabytes < MEGABYTES, (step, cost)


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux tells the memory of a program from what its parent held")
def test_memory_of_a_process_is_its_own() -> None:
    held = bytearray(300 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    words = [sys.executable, "-c", "from tests.ablations.memory import most_held; print(most_held())"]
    assert 5 < float(subprocess.run(words, capture_output=True, text=True, check=True).stdout) < 100
    assert most_held() > 300


@pytest.mark.slow
def test_the_same_at_a_smaller_scale(tmp_path: Path) -> None:
    """Every step of the benchmark works, and agrees on what there is."""
    total = scale.fill(tmp_path, 240)
    assert total == 300
    assert scale.validate(tmp_path) == "300 trials"
    for _ in range(2):  # without the index, and with it
        assert scale.resume(tmp_path) == f"300 trials, {scale.LEFT} left"
    assert scale.compact(tmp_path) == "290 rows"
    assert scale.status(tmp_path).startswith("290 of 300 trials finished (97 %)")
    assert scale.frame(tmp_path) == scale.frame_of_parts(tmp_path) == "290 finished rows"
