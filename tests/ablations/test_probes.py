"""What calibration has tried: shared by processes, remembered, and never half read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ablations.measure.probes import Probes
from tests.ablations.runs import ROOT


def test_a_cost_is_remembered_exactly_by_others_and_later(tmp_path: Path) -> None:
    one, other = Probes(tmp_path, identity="a"), Probes(tmp_path, identity="a")
    assert ("family", "12") not in one
    one["family", "12"] = 1 / 3
    assert other["family", "12"] == 1 / 3 and ("family", "12") in other
    other["family", "7/10"] = 0.1
    assert one["family", "7/10"] == 0.1 and len(one) == 2 and set(one) == {("family", "12"), ("family", "7/10")}
    assert dict(Probes(tmp_path, identity="a")) == dict(one)


def test_other_images_or_devices_are_another_file(tmp_path: Path) -> None:
    Probes(tmp_path, identity=["images", "cpu (1 thread)"])["family", 1] = 2.0
    with pytest.raises(KeyError):
        Probes(tmp_path, identity=["images", "cpu (2 threads)"])["family", 1]


def test_a_line_that_a_kill_cut_short_is_skipped(tmp_path: Path) -> None:
    one = Probes(tmp_path, identity="a")
    one["family", 1] = 1.0
    with one.path.open("ab") as file:
        file.write(b'["[\\"family\\", 2]", 2.')
    other = Probes(tmp_path, identity="a")
    assert ("family", 2) not in other
    other["family", 3] = 3.0
    assert Probes(tmp_path, identity="a")["family", 3] == 3.0
    assert len(Probes(tmp_path, identity="a")) == 2


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ablations.measure.probes import Probes\n"
        "probes = Probes(Path(sys.argv[1]), identity='a')\n"
        "for number in range(200): probes[sys.argv[2], number] = float(number)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name], cwd=ROOT) for name in ("a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    found = Probes(tmp_path, identity="a")
    assert len(found) == 400 and found["b", 199] == 199.0


def test_a_folder_that_is_gone_costs_time_and_no_result(tmp_path: Path) -> None:
    probes = Probes(tmp_path / "gone", identity="a")
    probes["family", 1] = 1.5
    assert probes["family", 1] == 1.5
