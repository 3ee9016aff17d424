"""Killed at random, again and again: driver and workers, at whatever moment; nothing lost, twice, or spoilt."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ablations.store.store import Store
from tests.ablations.runs import (
    LONGER,
    TINY,
    alive,
    assert_same_results,
    family_of,
    fingerprints,
    grid,
    launch,
    serial,
    wait_until,
    workers_of,
)

KILLS = int(os.environ.get("SIEVIT_TEST_KILLS", "20"))
TRIALS = 40
MOST_STARTS = 3 * KILLS + 10  # of the same command; a run that never ends must not keep a test for ever
VICTIMS = ("driver", "worker", "worker")


@dataclass
class Campaign:
    """Kills at moments that a seed draws, and what has been seen of results meanwhile."""

    draw: random.Random
    killed: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0})
    repeated: int = 0  # finished trials whose files changed afterwards
    starts: int = 0

    @property
    def over(self) -> bool:
        return sum(self.killed.values()) >= KILLS

    def run(self, out: Path, spec: Path) -> None:
        """The same command until every trial is finished, hurt as long as there are kills left."""
        known: dict[str, tuple[str, str, int]] = {}  # every finished trial, as it was when it was first seen
        while len(Store(out).finished()) < TRIALS:
            self.starts += 1
            assert self.starts <= MOST_STARTS, "the run never ends"
            process = launch("run", "--out", out, *TINY, *LONGER, "--workers", "2", "--specs", spec)
            self._hurt(process)
            process.communicate()
            for key, found in fingerprints(out, Store(out).finished()).items():
                self.repeated += known.setdefault(key, found) != found

    def _hurt(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not self.over:
            victim = self.draw.choice(VICTIMS)
            if victim == "worker":  # it is there some seconds after the driver
                wait_until(lambda: bool(workers_of(process)) or process.poll() is not None)
            time.sleep(self.draw.uniform(0.0, 8.0 if victim == "worker" else 16.0))
            if victim == "driver" and process.poll() is None:
                family = family_of(process.pid)
                process.kill()
                process.wait()
                self.killed["driver"] += 1
                wait_until(_gone(family))  # what it started ends with it
            elif workers := workers_of(process):
                with suppress(ProcessLookupError):
                    os.kill(self.draw.choice(workers), signal.SIGKILL)
                    self.killed["worker"] += 1


def _gone(family: list[int]) -> Callable[[], bool]:
    return lambda: not alive(family)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes of its own run through /proc")
def test_runs_that_are_killed_at_twenty_random_moments_end_like_one_that_was_not(
    tmp_path: Path, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spec, campaign, lost, twice = grid(tmp_path, TRIALS), Campaign(random.Random(6)), 0, 0
    rows = serial(tmp_path / "serial", spec, *LONGER)
    rounds = 0
    while not campaign.over:
        rounds += 1
        out = tmp_path / f"out {rounds}"
        campaign.run(out, spec)
        keys = pq.read_table(out / "results.parquet")["key"].to_pylist()
        lost += len(set(rows) - set(keys))
        twice += len(keys) - len(set(keys))
        assert_same_results(out, tmp_path / "serial", rows)  # corrupted: none
    found = {
        "kills": campaign.killed, "runs": rounds, "starts": campaign.starts, "trials": rounds * TRIALS,
        "lost": lost, "duplicated": twice + campaign.repeated, "corrupted": 0,
    }  # fmt: skip
    record_property("campaign", str(found))
    with capsys.disabled():
        sys.stdout.write(f"\n{found}\n")  # the figures of docs/faults.md
    assert (found["lost"], found["duplicated"]) == (0, 0)
    assert campaign.over and min(campaign.killed.values()) > 0
